import copy
import gc
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fpd_accel import metrics
from fpd_accel import oks as similarity
from fpd_accel.decode import heatmap_accuracy
from fpd_accel.errors import DataError
from fpd_accel.skeleton import COCO

SHARED = Path(__file__).parents[1].parent / "shared"
FIXTURE = SHARED / "reference" / "decode_losses_nms.npz"
ANNOTATIONS = SHARED / "data" / "coco_sample" / "person_keypoints.json"


def people(count=12, joints=17, seed=0):
    """Return crowded poses in groups of three similar ones, with different scores and areas."""
    random = np.random.default_rng(seed)
    keypoints = np.repeat(random.uniform(0, 300, (count // 3, joints, 2)), 3, axis=0)
    keypoints += random.normal(scale=4.0, size=keypoints.shape)
    return keypoints, random.permutation(count) / count + 0.01, random.uniform(4000, 20000, count)


def slow_oks(one, other, area, other_area, sigmas):
    total = 0.0
    for (x0, y0), (x1, y1), sigma in zip(one, other, sigmas, strict=True):
        squared = (x1 - x0) ** 2 + (y1 - y0) ** 2
        total += math.exp(-squared / (2 * ((area + other_area) / 2) * (2 * sigma) ** 2))
    return total / len(one)


def slow_nms(keypoints, scores, areas, threshold, sigmas):
    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all(slow_oks(keypoints[k], keypoints[i], areas[k], areas[i], sigmas) <= threshold for k in kept):
            kept.append(i)
    return kept


def slow_soft_nms(keypoints, scores, areas, threshold, sigmas, limit):
    left, kept = dict(enumerate(scores)), []
    while left and len(kept) < limit:
        best = max(left, key=left.get)
        del left[best]
        kept.append(best)
        for i in left:
            left[i] *= math.exp(
                -(slow_oks(keypoints[best], keypoints[i], areas[best], areas[i], sigmas) ** 2) / threshold
            )
    return kept


@pytest.mark.skipif(not FIXTURE.is_file(), reason="no published numbers beside this checkout")
@pytest.mark.parametrize("columns", [2, 3])
def test_suppression_keeps_the_people_that_the_published_code_keeps(columns):
    with np.load(FIXTURE) as fixture:
        case = [fixture[f"nms_{name}"] for name in ("keypoints", "scores", "areas")]
        case[0] = case[0][..., :columns]
        assert metrics.oks_nms(*case, 0.9).tolist() == fixture["nms_keep_090"].tolist()
        assert metrics.oks_nms(*case, 0.5).tolist() == fixture["nms_keep_050"].tolist()
        assert metrics.soft_oks_nms(*case, 0.5).tolist() == fixture["soft_nms_keep_050"].tolist()


@pytest.mark.parametrize("joints", [3, 17])
def test_similarity_and_suppression_equal_loops_with_any_number_of_joints(joints):
    keypoints, scores, areas = people(joints=joints)
    sigmas = np.linspace(0.03, 0.1, joints)
    matrix = metrics.oks(keypoints, keypoints[:5], areas, areas[:5], sigmas)
    for i, j in np.ndindex(12, 5):
        assert matrix[i, j] == pytest.approx(slow_oks(keypoints[i], keypoints[j], areas[i], areas[j], sigmas))
    threshold = float(np.median(matrix[matrix > 0.01]))
    expected = slow_nms(keypoints, scores, areas, threshold, sigmas)
    assert 4 <= len(expected) < 12
    assert metrics.oks_nms(keypoints, scores, areas, threshold, sigmas).tolist() == expected
    expected = slow_soft_nms(keypoints, scores, areas, 0.5, sigmas, 7)
    assert metrics.soft_oks_nms(keypoints, scores, areas, 0.5, sigmas, limit=7).tolist() == expected


@pytest.mark.parametrize("pairs", [1, 7, 1 << 15])
def test_suppression_of_many_images_at_once_equals_that_of_each(pairs, monkeypatch):
    monkeypatch.setattr(similarity, "PAIRS", pairs)  # computed in blocks
    keypoints, scores, areas = people(count=60)
    scores = np.round(scores, 1)  # ties
    random = np.random.default_rng(1)
    images = random.permutation(np.repeat([9, 4, 70, 5], [1, 30, 9, 20]))
    groups = [np.flatnonzero(images == image) for image in sorted(set(images.tolist()))]
    expected, softly = [], []
    for own in groups:
        one = keypoints[own], scores[own], areas[own]
        expected += own[slow_nms(*one, 0.3, COCO.sigmas)].tolist()
        softly += own[slow_soft_nms(*one, 0.3, COCO.sigmas, 12)].tolist()
    assert len(groups) < len(expected) < 60
    assert len(softly) == 1 + 12 + 9 + 12
    assert metrics.oks_nms_by_image(images, keypoints, scores, areas, 0.3).tolist() == expected
    assert metrics.soft_oks_nms_by_image(images, keypoints, scores, areas, 0.3, limit=12).tolist() == softly
    nobody = images[:0], keypoints[:0], scores[:0], areas[:0]
    assert metrics.oks_nms_by_image(*nobody, 0.3).tolist() == metrics.soft_oks_nms_by_image(*nobody, 0.3).tolist() == []


def test_someone_nowhere_is_dropped_and_drops_others():
    keypoints, scores, areas = np.zeros((3, 17, 2)), np.array([0.9, 0.8, 0.7]), np.ones(3)
    keypoints[1:] += 100.0 * np.arange(1, 3)[:, None, None]  # far from each other
    keypoints[1, 0] = np.nan
    assert metrics.oks_nms(keypoints, scores, areas, 0.9).tolist() == [0, 2]


def test_suppression_of_nobody_and_of_one_person():
    keypoints, scores, areas = people()
    for suppress in (metrics.oks_nms, metrics.soft_oks_nms):
        assert suppress(keypoints[:0], scores[:0], areas[:0], 0.5).tolist() == []
        assert suppress(keypoints[:1], scores[:1], areas[:1], 0.5).tolist() == [0]


def test_of_people_alike_the_first_of_the_best_is_kept_unless_the_limit_is_one():
    keypoints = np.zeros((3, 17, 2))
    scores, areas = np.array([0.5, 0.9, 0.9]), np.ones(3)
    assert metrics.oks_nms(keypoints, scores, areas, 0.9).tolist() == [1]
    assert metrics.oks_nms(keypoints, scores, areas, 1.0).tolist() == [1, 2, 0]  # only above the threshold
    # The second 0.9 decays by exp(-1 / 0.9), and so does 0.5.
    assert metrics.soft_oks_nms(keypoints, scores, areas, 0.9).tolist() == [1, 2, 0]
    assert metrics.soft_oks_nms(keypoints, scores, areas, 0.9, limit=1).tolist() == [1]


def test_soft_suppression_keeps_at_most_twenty():
    keypoints, scores, areas = people(count=30)
    assert len(metrics.soft_oks_nms(keypoints, scores, areas, 0.5)) == 20


def test_a_person_without_area_is_like_itself_and_unlike_others():
    keypoints = np.stack([np.zeros((17, 2)), np.ones((17, 2))])
    similarity = metrics.oks(keypoints, keypoints, np.zeros(2), np.zeros(2))
    np.testing.assert_array_equal(similarity, np.eye(2))


def test_sigmas_of_another_skeleton_are_refused():
    keypoints, scores, areas = people(joints=16)
    with pytest.raises(ValueError, match="17 sigmas for 16 joints"):
        metrics.oks_nms(keypoints, scores, areas, 0.9)


def test_rescoring_averages_confident_keypoints_only():
    keypoint_scores = np.array([[0.9, 0.5, 0.1], [0.2, 0.1, 0.0], [0.3, -5.0, 0.2]])
    scores = metrics.rescore(keypoint_scores, np.array([0.5, 0.9, 1.0]))
    np.testing.assert_allclose(scores, [0.35, 0.0, 0.3], rtol=1e-12)
    np.testing.assert_allclose(metrics.rescore(keypoint_scores, np.ones(3), threshold=0.6), [0.9, 0, 0], rtol=1e-12)


def test_heatmap_pck_is_the_training_accuracy_as_a_number():
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(8, 5, 12, 8, generator=generator)
    predicted = target + 0.3 * torch.rand(target.shape, generator=generator)
    for norm in (True, False):
        expected = float(heatmap_accuracy(predicted, target, reference_norm=norm))
        assert 0 < expected < 1
        assert metrics.heatmap_pck(predicted, target, reference_norm=norm) == expected
        frozen = target.numpy()
        frozen.flags.writeable = False
        assert metrics.heatmap_pck(predicted.numpy(), frozen, norm) == expected


def test_pckh_weights_joints_by_how_often_they_are_visible():
    truth = np.zeros((4, 3, 2))
    predicted = truth.copy()
    predicted[:, 0, 0] = [5.0, 5.01, 0.0, 100.0]  # head size 10: correct up to and including 5 pixels
    predicted[:, 1, 1] = [9.0, 9.0, 0.0, 0.0]
    visible = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]])
    result = metrics.pckh(predicted, truth, np.full(4, 10.0), visible)
    assert result.counted.tolist() == [3, 2, 0]
    np.testing.assert_allclose(result.per_joint, [200 / 3, 50.0, np.nan])
    assert result.mean == pytest.approx(100 * 3 / 5)
    assert metrics.pckh(predicted, truth, np.full(4, 10.0), visible, threshold=1.0).mean == 100.0


def test_pelvis_and_thorax_of_mpii_have_no_part_in_the_mean():
    truth, visible = np.zeros((2, 16, 2)), np.ones((2, 16), dtype=bool)
    predicted = truth.copy()
    predicted[:, [6, 7]] = 100.0
    result = metrics.pckh(predicted, truth, np.full(2, 10.0), visible)
    assert result.mean == 100.0
    assert result.per_joint[5:9].tolist() == [100.0, 0.0, 0.0, 100.0]
    assert metrics.pckh(predicted, truth, np.full(2, 10.0), visible, excluded=()).mean == pytest.approx(100 * 14 / 16)
    assert metrics.pckh(predicted[:, :15], truth[:, :15], np.full(2, 10.0), visible[:, :15]).mean < 100.0


def test_pckh_equals_a_loop():
    random = np.random.default_rng(3)
    truth, visible = random.uniform(0, 200, (20, 16, 2)), random.random((20, 16)) > 0.3
    predicted, heads = truth + random.normal(scale=15, size=truth.shape), random.uniform(15, 60, 20)
    right, counted = np.zeros(16), np.zeros(16)
    for n, j in zip(*visible.nonzero(), strict=True):
        counted[j] += 1
        right[j] += math.dist(predicted[n, j], truth[n, j]) <= 0.5 * heads[n]
    result = metrics.pckh(predicted, truth, heads, visible)
    np.testing.assert_allclose(result.per_joint, 100 * right / counted)
    body = [j for j in range(16) if j not in (6, 7)]
    assert result.mean == pytest.approx(100 * right[body].sum() / counted[body].sum())


def test_people_without_a_length_are_left_out():
    truth = np.zeros((4, 2, 2))
    lengths = np.array([np.nan, 0.0, np.inf, 10.0])
    result = metrics.pck(truth, truth, lengths, np.ones((4, 2)), 0.2)
    assert result.counted.tolist() == [1, 1]
    assert result.mean == 100.0


def test_pck_with_nobody_visible_is_undefined_not_zero():
    result = metrics.pck(np.zeros((2, 3, 2)), np.zeros((2, 3, 2)), np.ones(2), np.zeros((2, 3)), 0.2)
    assert result.counted.tolist() == [0, 0, 0]
    assert np.isnan(result.per_joint).all()
    assert math.isnan(result.mean)


def dataset(poses):
    """Return a dataset of one image with a person of medium size (area 64²) for each pose (x, y, visibility)."""
    annotations = [
        {"id": i, "image_id": 7, "category_id": 1, "iscrowd": 0, "area": 64.0**2, "bbox": [0, 0, 80, 80],
         "num_keypoints": int((pose[:, 2] > 0).sum()), "keypoints": pose.ravel().tolist()}
        for i, pose in enumerate(poses)
    ]  # fmt: skip
    return {"images": [{"id": 7}], "categories": [{"id": 1, "name": "person"}], "annotations": annotations}


def poses(count, joints=17, seed=0):
    random = np.random.default_rng(seed)
    xy = random.uniform(0, 64, (count, joints, 2)) + 200 * np.arange(count)[:, None, None]
    return np.concatenate([xy, np.full((count, joints, 1), 2.0)], axis=2)


def found(pose, score, **other):
    return {"image_id": 7, "category_id": 1, "keypoints": pose.ravel().tolist(), "score": score, **other}


@pytest.mark.skipif(not ANNOTATIONS.is_file(), reason="no sample of COCO beside this checkout")
def test_ground_truth_as_prediction_is_perfect():
    truth = json.loads(ANNOTATIONS.read_text(encoding="utf-8"))
    results = [
        {"score": 1.0, **{name: person[name] for name in ("image_id", "category_id", "keypoints", "area", "bbox")}}
        for person in truth["annotations"]
        if not person["iscrowd"] and person["num_keypoints"]
    ]
    before = copy.deepcopy((truth, results))
    scores = metrics.average_precision(truth, results, COCO.sigmas)
    assert (truth, results) == before
    assert tuple(scores) == metrics.AP_NAMES
    assert scores == pytest.approx(dict.fromkeys(metrics.AP_NAMES, 1.0))


@pytest.mark.parametrize("joints", [5, 16, 17])
def test_one_of_two_people_found_is_half_the_recall_with_any_number_of_joints(joints, capsys):
    truth = dataset(poses(2, joints))
    # Annotation 0 is found: pycocotools alone would take a match with annotation 0 for a miss.
    scores = metrics.average_precision(truth, [found(poses(2, joints)[0], 0.9)], np.full(joints, 0.05))
    # Precision 1 up to recall 0.5: 51 of the 101 recall levels.
    for name in ("AP", "AP50", "AP75", "AP_M"):
        assert scores[name] == pytest.approx(51 / 101), name
    for name in ("AR", "AR50", "AR75", "AR_M"):
        assert scores[name] == pytest.approx(0.5), name
    assert scores["AP_L"] == scores["AR_L"] == -1.0  # no large person in the ground truth
    assert capsys.readouterr().out == ""


def test_sigmas_decide_how_far_is_too_far():
    truth, moved = dataset(poses(1)), poses(1)[0]
    moved[:, 0] += 6.0  # pixels: OKS = exp(-36 / (2 * 64² * (2 sigma)²)), 0.64 for 0.05 and 0.87 for 0.09
    strict, lenient = (metrics.average_precision(truth, [found(moved, 1.0)], (s,) * 17) for s in (0.05, 0.09))
    assert strict["AP"] == pytest.approx(0.3)  # correct at 0.50, 0.55, 0.60 of ten thresholds
    assert lenient["AP"] == pytest.approx(0.8)  # correct up to 0.85


def test_false_alarms_cost_precision_by_their_score():
    truth, alarm = dataset(poses(1)), poses(2)[1]
    last = metrics.average_precision(truth, [found(poses(1)[0], 0.9), found(alarm, 0.1)])
    first = metrics.average_precision(truth, [found(poses(1)[0], 0.1), found(alarm, 0.9)])
    assert (last["AP"], last["AR"]) == pytest.approx((1.0, 1.0))
    assert (first["AP"], first["AR"]) == pytest.approx((0.5, 1.0))


def test_boxes_and_areas_among_the_results_have_no_influence():
    truth, pose = dataset(poses(1)), poses(1)[0]
    plain = metrics.average_precision(truth, [found(pose, 0.9)])
    boxed = metrics.average_precision(truth, [found(pose, 0.9, bbox=[0, 0, 2000, 2000], area=4e6, id=3)])
    assert plain == boxed


def test_entries_that_custom_datasets_leave_out_are_filled_in():
    truth, pose = dataset(poses(1)), poses(1)[0]
    for name in ("area", "iscrowd", "num_keypoints", "id"):
        del truth["annotations"][0][name]
    assert metrics.average_precision(truth, [found(pose, 0.9)])["AP"] == pytest.approx(1.0)


def test_no_results_score_zero():
    for truth in (dataset(poses(1)), dataset([])):
        assert metrics.average_precision(truth, [], COCO.sigmas) == dict.fromkeys(metrics.AP_NAMES, 0.0)


def test_results_without_anyone_in_the_ground_truth_are_undefined():
    unlabelled = poses(1)
    unlabelled[..., 2] = 0
    for truth in (dataset([]), dataset(unlabelled)):
        assert set(metrics.average_precision(truth, [found(poses(1)[0], 0.9)]).values()) == {-1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 8}, "image_id 8 is not an image"),
        ({"keypoints": [0.0] * 48}, "48 keypoint values, not 3 for each of 17 joints"),
    ],
)
def test_results_that_do_not_fit_the_ground_truth_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        metrics.average_precision(dataset(poses(1)), [{**found(poses(1)[0], 0.9), **change}])


def test_results_and_annotations_that_lack_an_entry_are_refused():
    incomplete = found(poses(1)[0], 0.9)
    del incomplete["score"], incomplete["category_id"]
    with pytest.raises(DataError, match="result 0: category_id, score missing"):
        metrics.average_precision(dataset(poses(1)), [incomplete])
    with pytest.raises(DataError, match="annotation 0: 48 keypoint values"):
        metrics.average_precision(dataset(poses(1, joints=16)), [found(poses(1)[0], 0.9)])
    truth = dataset(poses(1))
    del truth["annotations"][0]["area"], truth["annotations"][0]["bbox"]
    with pytest.raises(DataError, match="neither area nor bbox"):
        metrics.average_precision(truth, [found(poses(1)[0], 0.9)])


def test_collection_goes_on_after_scores_as_before_however_they_end():
    assert gc.isenabled()
    with pytest.raises(DataError):
        metrics.average_precision({"images": [], "annotations": []}, [{"image_id": 1}])
    assert gc.isenabled()
    gc.disable()
    try:
        with metrics.gc_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()
    with metrics.gc_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
