"""Published shards: the same people and pixels from any place, downloaded once, or streamed a window at a time."""

import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from jobs import killing_itself, launch, start, wait_for
from safetensors.torch import load_file

from fpd_accel.config.loading import load_recipe
from fpd_accel.config.schema import Augment
from fpd_accel.data.batch import Batch
from fpd_accel.data.mixture import Mixture
from fpd_accel.data.published import download as remote
from fpd_accel.data.published.publish import publish
from fpd_accel.data.published.stream import WINDOWS_KEPT, StreamedShards, open_training
from fpd_accel.data.shards import FORMAT, Shards
from fpd_accel.data.stream import PoseStream, make_loader
from fpd_accel.errors import CheckpointError, ConfigError, DataError
from fpd_accel.files import is_url, sha256
from fpd_accel.training.checkpoint import checkpoints, newest_whole, read_state

CPU = torch.device("cpu")
SMALL = (32, 24)  # (height, width) of crops where their content does not matter
STEPS = 14  # of four people each, of whom there are 27: into the third epoch
WINDOW = 2  # row groups of one image: few enough for images to come and go


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and downloads that fail at once."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(remote, "RETRY_DELAYS", (0.01, 0.01))
    return tmp_path / "cache" / "fpd_accel"


@pytest.fixture(scope="session")
def published(tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twelve images as Parquet: a row group for each, three to a file."""
    folder = tmp_path_factory.mktemp("published") / "train"
    layout = publish(Shards(tiny_shards), str(folder), images_per_group=1, file_size=14_000)
    assert [len(file.groups) for file in layout.images] == [3, 3, 3, 3]
    return folder


class Server(ThreadingHTTPServer):
    """Files of a folder on 127.0.0.1, by ranges too; counts what is asked for, and fails when told to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.broken = folder, list[str](), 0
        super().__init__(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def stop(self) -> None:
        if self.thread.is_alive():
            self.shutdown()
            self.thread.join()
            self.server_close()


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, directory=str(arguments[2].folder))

    def log_message(self, *_: Any) -> None:
        pass

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        path, asked = Path(self.translate_path(self.path)), self.headers.get("Range")
        if self.server.broken and self.path.endswith(".parquet"):
            self.server.broken -= 1
            self.send_error(503)
        elif asked is None or not path.is_file():
            super().do_GET()
        else:
            first, last = asked.removeprefix("bytes=").split("-")
            content = path.read_bytes()
            part = content[int(first) : int(last) + 1 if last else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)


@pytest.fixture
def server(published: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(published, tmp_path / "served" / "train")
    server = Server(tmp_path / "served")
    yield server
    server.stop()


def assert_same(found: Batch, expected: Batch) -> None:
    for name in ("crops", "keypoints", "visible", "centers", "sizes", "rows"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def stream(shards: Shards | Mixture, batch_size: int = 1, **options: Any) -> PoseStream:
    options = {"augment": Augment(), "seed": 5} | options
    return PoseStream(shards, input_size=SMALL, batch_size=batch_size, **options)


# --- publish ----------------------------------------------------------------------------------------------------


def assert_same_dataset(found: Shards, expected: Shards) -> None:
    assert found.fingerprint == expected.fingerprint
    assert found.skeleton == expected.skeleton
    assert found.usable.tolist() == expected.usable.tolist()
    assert found.images[:] == expected.images[:]
    for name, column in expected.people[:].items():
        np.testing.assert_array_equal(found.people[:][name], column, strict=True)
    assert_same(stream(found).batch(range(40)), stream(expected).batch(range(40)))


def test_published_shards_are_the_same_dataset(tiny_shards: Path, published: Path) -> None:
    assert_same_dataset(Shards(published), Shards(tiny_shards))
    assert_same_dataset(Shards(f"file://{published}"), Shards(tiny_shards))


def test_published_shards_can_be_published_again(tiny_shards: Path, published: Path, tmp_path: Path) -> None:
    layout = publish(Shards(published), str(tmp_path / "again"), images_per_group=5)
    assert [file.groups for file in layout.images] == [(5, 5, 2)]
    assert_same_dataset(Shards(tmp_path / "again"), Shards(tiny_shards))


def test_parquet_of_format_2_is_the_same_dataset_and_is_published_again_in_the_new_format(
    tiny_shards: Path, published: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published, tmp_path / "old"))
    description = json.loads((folder / "dataset.json").read_bytes()) | {"format": 2}
    description["unused"] = description.pop("exclude_reason")
    (file,) = description["parquet"]["people"]
    table = pq.read_table(folder / file["path"])
    metadata = {key: value.replace(b"exclude_reason", b"unused") for key, value in table.schema.metadata.items()}
    names = [name.replace("exclude_reason", "unused") for name in table.column_names]
    pq.write_table(table.rename_columns(names).replace_schema_metadata(metadata), folder / file["path"])
    file |= {"size": (folder / file["path"]).stat().st_size, "sha256": sha256(folder / file["path"])}
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    assert "unused" in pq.read_schema(folder / file["path"]).names
    assert_same_dataset(Shards(folder), Shards(tiny_shards))
    publish(Shards(folder), str(tmp_path / "again"))
    assert_same_dataset(Shards(tmp_path / "again"), Shards(tiny_shards))
    again = json.loads((tmp_path / "again" / "dataset.json").read_bytes())
    assert (again["format"], again["exclude_reason"], "unused" in again) == (FORMAT, description["unused"], False)


def test_people_of_mpii_and_images_alone_are_published_too(tmp_path: Path, tiny_shards: Path) -> None:
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "alone"))
    description = json.loads((folder / "dataset.json").read_bytes())
    description |= {"clip_boxes": False, "counts": description["counts"] | {"people": 0, "usable": 0}}
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
    layout = publish(Shards(folder), str(tmp_path / "published"))
    assert layout.people == ()
    found = Shards(tmp_path / "published")
    assert len(found) == len(found.people) == 0
    assert found.images[:] == Shards(folder).images[:]
    assert found.box_to_crop(np.array([-5.0, 0, 9, 9]), width=4, height=4).tolist() == [-5, 0, 9, 9]


def test_a_folder_that_is_published_appears_whole_or_not_at_all(
    tiny_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="taken: exists; remove it"):
        publish(Shards(tiny_shards), str(tmp_path / "taken"))
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/new: cannot be written \(Not a directory\)"):
        publish(Shards(tiny_shards), str(tmp_path / "file" / "new"))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        publish(Shards(tiny_shards), str(tmp_path / "new"))
    assert sorted(tmp_path.iterdir()) == before


def test_shards_are_published_to_a_url_with_the_description_last(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, written = fsspec.filesystem("memory"), []
    put = type(memory).put_file
    monkeypatch.setattr(
        type(memory), "put_file", lambda self, a, b, **options: (written.append(b), put(self, a, b, **options))
    )
    publish(Shards(tiny_shards), "memory://bucket/train", images_per_group=4)
    assert [name.removeprefix("/") for name in written] == [
        f"bucket/train/{name}" for name in ("images/00000.parquet", "people/00000.parquet", "dataset.json")
    ]
    assert_same_dataset(Shards("memory://bucket/train"), Shards(tiny_shards))
    streamed = StreamedShards("memory://bucket/train", window=1)
    assert sorted(stream(streamed).batch(range(len(streamed))).rows.tolist()) == streamed.usable.tolist()
    with pytest.raises(DataError, match="memory://bucket/train: exists"):
        publish(Shards(tiny_shards), "memory://bucket/train")
    memory.rm("/bucket", recursive=True)


def test_the_command_publishes_and_check_reads_it(
    tiny_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fpd_accel.cli import main

    output = tmp_path / "published"
    assert main(["publish", str(tiny_shards), str(output), "--group", "5"]) == 0
    assert "12 images in 3 row groups" in capsys.readouterr().err
    assert main(["check", f"file://{output}", "--output", str(tmp_path / "people.png")]) == 0
    assert (tmp_path / "people.png").is_file()
    assert main(["publish", str(tiny_shards), str(output)]) == 2
    assert main(["publish", str(tiny_shards), str(tmp_path / "other"), "--group", "0"]) == 2
    assert main(["publish", str(tmp_path / "nothing"), str(tmp_path / "other")]) == 2


# --- cached -----------------------------------------------------------------------------------------------------


def test_a_url_is_downloaded_once_and_needs_no_network_after_that(
    server: Server, tiny_shards: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{server.url}/train"
    assert_same_dataset(Shards(url), Shards(tiny_shards))
    said = capsys.readouterr().err
    assert f"{url}: downloading images, 0.1 MB, into {cache}" in said
    asked = [path for path in server.requests if path.endswith(".parquet")]
    assert len(asked) == len(set(asked)) == 5
    assert not list(cache.rglob("*.parquet"))  # Arrow alone is kept
    server.requests.clear()
    assert_same_dataset(Shards(url), Shards(tiny_shards))
    assert set(server.requests) == {"/train/dataset.json"}
    assert "downloading" not in capsys.readouterr().err
    server.stop()
    assert_same_dataset(Shards(url), Shards(tiny_shards))
    assert f"{url}/dataset.json: cannot be read" in (warning := capsys.readouterr().err)
    assert "using its dataset.json of the last download" in warning


def test_one_process_downloads_and_the_others_wait(server: Server, tiny_shards: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        opened = pool.map(Shards, [f"{server.url}/train"] * 4, chunksize=1)
    asked = [path for path in server.requests if path.endswith(".parquet")]
    assert len(asked) == len(set(asked)) == 5
    assert {len(shards.images) for shards in opened} == {12}


def test_a_dataset_that_was_replaced_is_downloaded_anew(server: Server, tiny_valid: Path, tiny_shards: Path) -> None:
    url = f"{server.url}/train"
    first = Shards(url)
    shutil.rmtree(server.folder / "train")
    publish(Shards(tiny_valid), str(server.folder / "train"))
    assert_same_dataset(Shards(url), Shards(tiny_valid))
    assert_same_dataset(first, Shards(tiny_shards))  # what is open stays what it was


def test_a_download_is_tried_again(server: Server, tiny_shards: Path) -> None:
    server.broken = 2
    assert_same_dataset(Shards(f"{server.url}/train"), Shards(tiny_shards))


def test_a_download_that_broke_off_goes_on_with_the_next_file(server: Server, tiny_shards: Path, cache: Path) -> None:
    missing = server.folder / "train" / "images" / "00002.parquet"
    missing.rename(server.folder / "aside")
    with pytest.raises(DataError, match=r"images/00002\.parquet: no such file"):
        Shards(f"{server.url}/train")
    (server.folder / "aside").rename(missing)
    server.requests.clear()
    assert_same_dataset(Shards(f"{server.url}/train"), Shards(tiny_shards))
    assert [path for path in server.requests if "images" in path] == [
        f"/train/images/{name}.parquet" for name in ("00002", "00003")
    ]
    (folder,) = (path for path in cache.iterdir() if path.name != "descriptions")
    assert sorted(path.name for path in folder.iterdir()) == ["images", "images.lock", "people", "people.lock"]


def test_published_shards_can_be_sent_to_a_worker(published: Path) -> None:
    for shards in (Shards(published), StreamedShards(published, window=WINDOW)):
        expected = stream(shards).batch(range(3))
        again = pickle.loads(pickle.dumps(shards))
        assert_same(stream(again).batch(range(3)), expected)
        assert len(pickle.dumps(shards)) < 20_000  # bytes: no data


# --- mistakes ---------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)


def describe(folder: Path, **changes: Any) -> None:
    description = json.loads((folder / "dataset.json").read_bytes()) | changes
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")


FILE = "images/00001.parquet"
SPOILED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no dataset": (lambda f: (f / "dataset.json").unlink(), r"train/dataset\.json: no such file; `fpd-accel publish`"),
    "a file that is missing": (lambda f: (f / FILE).unlink(), rf"train/{FILE}: no such file"),
    "a file cut off": (lambda f: cut(f / FILE), rf"train/{FILE}: \d+ bytes, but dataset\.json says \d+: truncated"),
    "a damaged description": (lambda f: describe(f, parquet=[]), r"train/dataset\.json: damaged"),
    "a path out of the folder": (
        lambda f: describe(f, parquet={"people": [], "images": [{"path": "images/../../x.parquet"}]}),
        r"train/dataset\.json: damaged",
    ),
    "shards that are Arrow": (
        lambda f: (f / "dataset.json").write_text(
            json.dumps({k: v for k, v in json.loads((f / "dataset.json").read_bytes()).items() if k != "parquet"})
        ),
        r"train: prepared for local use; publish it with `fpd-accel publish`",
    ),
}


@pytest.mark.parametrize("spoiled", SPOILED)
def test_what_cannot_be_downloaded_is_named(server: Server, spoiled: str, cache: Path) -> None:
    spoil, message = SPOILED[spoiled]
    spoil(server.folder / "train")
    with pytest.raises(DataError, match=message) as caught:
        Shards(f"{server.url}/train")
    assert str(caught.value).count("\n") <= message.count("damaged") * 20  # one line; the parser's words have several
    assert not list(cache.glob("*/images"))


def test_a_bit_that_flipped_is_noticed(server: Server) -> None:
    flip_bit(server.folder / "train" / FILE)
    with pytest.raises(DataError, match=rf"{FILE}: not the file that dataset\.json describes \(SHA-256\)"):
        Shards(f"{server.url}/train")
    shards = StreamedShards(f"{server.url}/train", window=WINDOW)
    with pytest.raises(DataError, match=rf"{FILE}: cannot be read \(.*CRC.*\), tried 3 times; the last checkpoint"):
        stream(shards).batch(range(len(shards)))


def test_places_that_cannot_be_reached_are_named(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()
    with pytest.raises(DataError, match=r"train/dataset\.json: cannot be read \(.*\), tried 3 times$"):
        Shards(f"{server.url}/train")
    with pytest.raises(DataError, match=r"^s4://bucket/train/dataset\.json: cannot be read \(ValueError: .*s4"):
        Shards("s4://bucket/train")
    # Nothing of the Hub is reached from here: its client is told to stay offline, and says so.
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^hf://datasets/someone/people/dataset\.json: cannot be read \(.*ffline"):
        Shards("hf://datasets/someone/people")


def test_a_cached_copy_that_was_damaged_is_named(published: Path) -> None:
    folder = Shards(published).folders["images"]
    path = sorted(folder.rglob("*.arrow"))[1]
    cut(path)
    with pytest.raises(DataError, match=rf"{folder}: cannot be opened \(.*\); remove it, to download it again"):
        _ = Shards(published).images
    path.unlink()
    with pytest.raises(DataError, match=r"cannot be opened \(9 rows\)"):
        _ = Shards(published).images


def test_a_cache_that_cannot_be_written_is_named(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file")
    with pytest.raises(DataError, match=r"the cache cannot be written: Not a directory; HF_DATASETS_CACHE names"):
        Shards(published)


def test_recipes_take_urls(tiny_recipe: Callable[..., Path]) -> None:
    urls = {"train": "hf://datasets/someone/people", "valid": "https://example.org/valid"}
    assert load_recipe(tiny_recipe(data=urls)).data.train == urls["train"]
    with pytest.raises(ConfigError, match=r"data\.train: data/people: no prepared dataset there"):
        load_recipe(tiny_recipe(data=urls | {"train": "data/people"}))
    with pytest.raises(ConfigError, match=r"data\.synthetic: draws into folders"):
        load_recipe(tiny_recipe(data=urls | {"synthetic": {}}))
    with pytest.raises(ConfigError, match=r"data\.streaming: boxes need their images at hand"):
        load_recipe(
            tiny_recipe(data=urls | {"streaming": True, "unlabelled": {"shards": "s3://b/c", "boxes": "boxes.json"}})
        )
    chained = ("simplecache::s3://bucket/x", "memory://x", "file:///x")
    assert all(map(is_url, chained))
    assert not any(map(is_url, ("data/x", "/data/x", "a:b", "", "C:/x", "x/y://z")))


def test_shards_that_are_not_parquet_cannot_be_streamed(tiny_shards: Path) -> None:
    with pytest.raises(DataError, match="not Parquet, so it cannot be streamed; write it with `fpd-accel publish`"):
        open_training(str(tiny_shards), streaming=True, window=WINDOW)
    assert type(open_training(str(tiny_shards), streaming=False, window=WINDOW)) is Shards


# --- streamed ---------------------------------------------------------------------------------------------------


def test_a_streamed_epoch_has_everybody_once_and_mixes_a_window_at_a_time(published: Path) -> None:
    shards = StreamedShards(published, window=WINDOW)
    orders = [shards.order(seed, epoch, source=0) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        assert sorted(order.tolist()) == list(range(len(shards)))
        images = shards.people[shards.usable[order]]["image_row"]
        groups = list(dict.fromkeys(images.tolist()))  # row groups of one image, in the order they come in
        for first in range(0, len(groups), WINDOW):
            window = np.isin(images, groups[first : first + WINDOW])
            assert np.diff(np.flatnonzero(window)).max(initial=1) == 1  # in one stretch
    assert len({tuple(order.tolist()) for order in orders}) == 3
    np.testing.assert_array_equal(shards.order(1, 0, source=0), orders[0])  # whatever was asked before
    assert any(np.diff(np.sort(order[:5])).max() > 1 for order in orders)  # people of several images are mixed


def test_a_person_looks_the_same_streamed_and_local(tiny_shards: Path, published: Path) -> None:
    """Augmentation hangs on person and epoch alone, whatever the order."""
    people = len(Shards(tiny_shards))
    local, streamed = (
        stream(shards).batch(range(people, 2 * people))
        for shards in (Shards(tiny_shards), StreamedShards(published, window=WINDOW))
    )
    assert local.rows.tolist() != streamed.rows.tolist()
    a, b = local.rows.argsort(), streamed.rows.argsort()
    assert torch.equal(local.crops[a], streamed.crops[b])
    assert torch.equal(local.keypoints[a], streamed.keypoints[b])
    assert_same(  # without a seed the order is that of the people
        stream(StreamedShards(published, window=WINDOW), augment=None).batch(range(people)),
        stream(Shards(tiny_shards), augment=None).batch(range(people)),
    )


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("start", [0, 14])
@pytest.mark.faults
def test_two_ranks_of_two_workers_see_everybody_once_per_epoch(server: Server, start: int, streaming: bool) -> None:
    """Also from mid-epoch: what comes then is what would have come."""
    shards = open_training(f"{server.url}/train", streaming=streaming, window=WINDOW)
    people, batch_size = len(shards), 2
    stop = start + -(-(2 * people - start) // (2 * batch_size)) * 2 * batch_size
    options: dict[str, Any] = {"batch_size": batch_size, "ranks": 2, "start": start, "stop": stop}
    loaders = [iter(make_loader(stream(shards, rank=rank, **options), 2, CPU)) for rank in range(2)]
    batches = [batch for step in zip(*loaders, strict=True) for batch in step]
    expected = stream(StreamedShards(shards.path, window=WINDOW) if streaming else shards)
    for number, batch in enumerate(batches):
        first = start + number * batch_size
        assert_same(batch, expected.batch(range(first, first + batch_size)))
    rows = torch.cat([batch.rows for batch in batches])[: 2 * people - start].tolist()
    assert sorted(rows[-people:]) == shards.usable.tolist()
    assert len(set(rows[:-people])) == people - start


def test_a_stream_keeps_three_windows_on_the_disk_and_fetches_a_row_group_once_per_epoch(server: Server) -> None:
    shards = StreamedShards(f"{server.url}/train", window=WINDOW)
    folder, most = shards.images.folder, 0
    fetched: list[int] = []
    read = type(shards.published).read_group

    def counted(published: Any, group: int) -> Any:
        fetched.append(group)
        return read(published, group)

    epoch = len(shards)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(shards.published), "read_group", counted)
        for batch in make_loader(stream(shards, stop=epoch), 0, CPU):
            assert len(batch) == 1
            most = max(most, len(list(folder.glob("*.arrow"))))
    assert most == WINDOWS_KEPT * WINDOW
    assert sorted(fetched) == list(range(12))
    assert len(shards.images._opened) <= 2 * WINDOW
    assert not list(folder.glob("*.part"))


def test_workers_fetch_the_next_window_ahead_and_share_what_they_fetch(server: Server) -> None:
    shards = StreamedShards(f"{server.url}/train", window=4)
    folder, images = shards.images.folder, shards.people[shards.usable[shards.order(5, 0, source=0)]]["image_row"]
    windows = [window.tolist() for window in shards.images._plan]
    own = int(np.isin(images, windows[0]).sum()) // 2 * 2  # people of the first window, in whole batches
    batches = iter(make_loader(stream(shards, batch_size=2, stop=own), 2, CPU))
    next(batches)
    ahead = [folder / f"{group:06}.arrow" for group in windows[1]]
    wait_for(lambda: all(path.is_file() for path in ahead), "the row groups of the next window")


def test_half_written_files_are_replaced_and_old_ones_removed(published: Path) -> None:
    shards = StreamedShards(published, window=WINDOW)
    folder = shards.images.folder
    folder.mkdir(parents=True)
    (folder / ".000003.arrow.part").write_bytes(b"half")
    (folder / ".000099.arrow.part").write_bytes(b"of a process that was killed yesterday")
    os.utime(folder / ".000099.arrow.part", (0, 0))
    assert shards.images[[3]]["file_name"] == Shards(published).images[[3]]["file_name"]
    assert sorted(path.name for path in folder.iterdir()) == ["000003.arrow", "03.lock"]
    cut(folder / "000003.arrow")
    with pytest.raises(DataError, match=r"000003\.arrow: cannot be opened \(.*\); remove it, to fetch it again"):
        _ = StreamedShards(published, window=WINDOW).images[[3]]


def test_images_that_are_not_those_of_the_description_are_not_streamed(published: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(published, tmp_path / "copy"))
    description = json.loads((copy / "dataset.json").read_bytes())
    description["parquet"]["images"][0]["digests"][0] = "0" * 64
    (copy / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match=r"row group 0 is not that of dataset\.json \(SHA-256\)"):
        _ = StreamedShards(copy, window=WINDOW).images[[0]]


def test_a_stream_that_breaks_off_is_tried_again_and_then_named(server: Server) -> None:
    shards = StreamedShards(f"{server.url}/train", window=WINDOW)
    server.broken = 2
    stream(shards).batch(range(1))  # the third try succeeds
    server.stop()
    message = r"images/0000\d\.parquet: cannot be read \(.*\), tried 3 times; the last checkpoint is intact: the same"
    with pytest.raises(DataError, match=message):
        stream(shards).batch(range(len(shards)))
    with pytest.raises(DataError, match=message):
        list(make_loader(stream(shards, batch_size=4), 1, CPU))


def test_evaluation_by_a_url_is_that_of_local_shards(server: Server, tiny_shards: Path, tmp_path: Path) -> None:
    from fpd_accel.data.detections import open_detections
    from fpd_accel.evaluation.evaluate import evaluate
    from fpd_accel.models.create import create_model

    torch.manual_seed(0)
    model = create_model("tiny_w8", 17)
    both = [Shards(tiny_shards), Shards(f"{server.url}/train")]
    local, cached = (evaluate(model, shards, input_size=(64, 64))[0] for shards in both)
    assert local == cached
    people = both[0].people[:4]
    boxes = [
        {"image_id": image, "category_id": 1, "bbox": box, "score": 0.5}
        for image, box in zip(people["image_id"].tolist(), people["box"].tolist(), strict=True)
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    detected = [open_detections(shards, str(tmp_path / "boxes.json"), threshold=0.1) for shards in both]
    assert detected[0].fingerprint == detected[1].fingerprint
    assert_same(*(stream(shards, augment=None).batch(range(4)) for shards in detected))


def test_streams_are_mixed_as_other_datasets_are(server: Server, tiny_valid: Path, tmp_path: Path) -> None:
    publish(Shards(tiny_valid), str(server.folder / "valid"), images_per_group=1)
    parts = [StreamedShards(f"{server.url}/{name}", window=WINDOW) for name in ("train", "valid")]
    mixture = Mixture(tuple(parts))
    rows: list[list[int]] = [[], []]
    mixed = stream(mixture)
    for sample in range(len(mixture)):
        number, own = mixture.locate(sample)
        assert mixed.batch(range(sample, sample + 1)).rows.tolist() == [
            parts[number].usable[parts[number].order(5, 0, source=number)[own]]
        ]
        rows[number].append(own)
    assert [len(own) for own in rows] == [len(shards) for shards in parts]


# --- training ---------------------------------------------------------------------------------------------------


def train(recipe: Path, *overrides: str) -> None:
    from fpd_accel.training.run import run

    run(load_recipe(recipe, overrides))


def curve(directory: Path) -> list[list[float]]:
    records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    names = ("step", "train_loss", "train_acc", "lr")
    return [[record[name] for name in names] for record in records if record["kind"] == "train"]


def assert_same_end(one: Path, other: Path) -> None:
    assert curve(one) == curve(other)
    for name in ("student", "optimizer"):
        ends = [load_file(checkpoints(run / "checkpoints")[-1] / f"{name}.safetensors") for run in (one, other)]
        assert ends[0].keys() == ends[1].keys()
        assert all(ends[0][key].equal(ends[1][key]) for key in ends[0]), name


@pytest.mark.faults
def test_a_run_on_a_url_is_the_run_on_local_shards(
    server: Server, tiny_recipe: Callable[..., Path], tiny_valid: Path, tmp_path: Path
) -> None:
    publish(Shards(tiny_valid), str(server.folder / "valid"))
    urls = {"train": f"{server.url}/train", "valid": f"{server.url}/valid"}
    train(tiny_recipe(run={"name": "local"}))
    train(tiny_recipe(run={"name": "url"}, data=urls))
    assert_same_end(tmp_path / "local", tmp_path / "url")
    server.stop()
    train(tiny_recipe(run={"name": "url"}, data=urls, train={"steps": 6}))  # goes on without the network
    assert [row[0] for row in curve(tmp_path / "url")] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def streaming_recipe(server: Server, tiny_recipe: Callable[..., Path]) -> Callable[..., Path]:
    """A function that writes the recipe of a run on a stream, of two epochs and a bit."""

    def write(name: str, **train: Any) -> Path:
        return tiny_recipe(
            file_name=f"{name}.yaml",
            run={"name": name},
            data={"train": f"{server.url}/train", "workers": 2, "streaming": True, "stream_window": WINDOW},
            train={"steps": STEPS, **train},
            evaluate={"every_epochs": None},
            checkpoint={"every_steps": 3},
        )

    return write


@pytest.mark.faults
def test_a_killed_run_on_a_stream_resumes_bit_for_bit(streaming_recipe: Callable[..., Path], tmp_path: Path) -> None:
    train(streaming_recipe("whole"))
    script = killing_itself(tmp_path, step=5)
    job = start(script, "--config", streaming_recipe("killed"), "checkpoint.background=false", **cache_of(tmp_path))
    assert job.wait() == -signal.SIGKILL, job.output()
    assert read_state(newest_whole(tmp_path / "killed" / "checkpoints"))["step"] == 3
    train(tmp_path / "killed.yaml")
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.faults
def test_two_ranks_on_a_stream_go_on_where_they_were_stopped(
    streaming_recipe: Callable[..., Path], published: Path, tmp_path: Path
) -> None:
    """Each of two workers: whom the networks of both see, everybody once per epoch, and what they make of it."""
    # Statistics would come back as a mean: without training them the ends are equal bit for bit.
    recipes = {name: str(streaming_recipe(name, freeze_norm=True)) for name in ("whole", "halves")}
    half = 5  # steps: in the middle of an epoch, and not at a checkpoint
    notes = {name: str(tmp_path / f"people_{name}") for name in recipes}
    tasks = [["train_recording_people", recipe, [], notes[name]] for name, recipe in recipes.items()]
    stopped = ["train_recording_people", recipes["halves"], [], notes["halves"], half]
    said = launch(2, [stopped, *tasks], **cache_of(tmp_path))
    resumed = re.search(rf"resuming {tmp_path / 'halves'} from step_(\d+): step \d+ of {STEPS}", said)
    assert resumed is not None
    assert half <= int(resumed[1]) < STEPS
    rows = {name: [seen_by(f"{notes[name]}.{rank}") for rank in range(2)] for name in recipes}
    assert rows["halves"] == rows["whole"]
    in_order = [row for step in zip(*rows["whole"], strict=True) for batch in step for row in batch]
    people = Shards(published).usable.tolist()
    people = Shards(published).usable.tolist()
    epochs = [in_order[first : first + len(people)] for first in range(0, 4 * STEPS, len(people))]
    assert sum(map(len, epochs)) == len(in_order) == 4 * STEPS
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) < len(people) or sorted(epoch) == people
    assert len(epochs) > 2
    assert_same_end(tmp_path / "whole", tmp_path / "halves")


def seen_by(notes: str) -> list[list[int]]:
    return [json.loads(line) for line in Path(notes).read_text().splitlines()]


def cache_of(folder: Path) -> dict[str, str]:
    """For jobs: the cache of the test."""
    return {"HF_DATASETS_CACHE": str(folder / "cache")}


@pytest.mark.faults
def test_a_run_whose_stream_breaks_off_ends_with_one_line_and_keeps_its_checkpoint(
    server: Server, tiny_recipe: Callable[..., Path], tmp_path: Path, cache: Path
) -> None:
    recipe = tiny_recipe(
        data={"train": f"{server.url}/train", "workers": 1, "streaming": True, "stream_window": WINDOW},
        evaluate={"every_epochs": None},
    )
    train(recipe)
    server.stop()
    for path in cache.rglob("stream/*/*.arrow"):
        path.unlink()
    with pytest.raises(DataError, match=r"images/0000\d\.parquet: cannot be read .* the last checkpoint is") as caught:
        train(recipe, "train.steps=8")
    assert "\n" not in str(caught.value)
    assert read_state(newest_whole(tmp_path / "tiny" / "checkpoints"))["step"] == 4


def test_a_resume_that_would_change_the_order_is_refused(
    server: Server, tiny_recipe: Callable[..., Path], tiny_shards: Path
) -> None:
    url = f"{server.url}/train"
    data = {"train": url, "streaming": True, "stream_window": WINDOW}
    train(tiny_recipe(data=data))
    with pytest.raises(CheckpointError, match=r"data\.streaming: True -> False"):
        train(tiny_recipe(data=data | {"streaming": False}))
    with pytest.raises(CheckpointError, match=r"data\.stream_window: 2 -> 3"):
        train(tiny_recipe(data=data | {"stream_window": 3}))
    shutil.rmtree(server.folder / "train")
    publish(Shards(tiny_shards), str(server.folder / "train"), images_per_group=2)
    with pytest.raises(CheckpointError, match=r"data\.train is not what this run was begun with"):
        train(tiny_recipe(data=data))


def test_unlabelled_people_are_streamed_too(server: Server, tiny_shards: Path) -> None:
    shards = StreamedShards(f"{server.url}/train", window=WINDOW)
    mixed = stream(Shards(tiny_shards), unlabelled=shards, share=0.5).batch(range(2 * len(shards)))
    assert mixed.labelled is not None
    own = mixed.rows[mixed.labelled == 0].tolist()
    assert own == shards.usable[shards.order(5, 0, source=1)].tolist()
