"""The table of refusals: commands with a mistake of the user, and the message that answers each.

`test_mistakes.py` runs every row in a working directory of its own. It checks that the command ends with exit code 2
and one error without a traceback, that the message is that of the row, and that no file is written, changed or removed.

To add a row, choose the section of the command. In commands, files and messages, `$name` is a path of `terminal.Place`,
which makes the file when it is first named. An expected line leaves words out with "…".
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

SOUND = """
run: {name: sound, root: .}
data: {train: $train, input_size: [64, 64], workers: 0}
student: {arch: tiny_w8}
distill: {mode: normal}
train: {steps: 10, global_batch: 96}
optim: {schedule: constant}
log: {pictures_every_steps: null, trackers: []}
"""
TEACHER = SOUND.replace("name: sound", "name: wise")
STEPS = "{steps: 10, global_batch: 96}"
FINISHED = SOUND.replace("name: sound", "name: $run").replace(STEPS, "{steps: 2, global_batch: 4}")


@dataclass(frozen=True)
class Refusal:
    """A mistake and its answer.

    For recipes `says` are all the mistakes that are listed, in their order, each from its beginning. For other commands
    they are parts of the message.
    """

    command: str  # words as a shell splits them
    says: tuple[str, ...]
    files: Mapping[str, str] = field(default_factory=dict)  # text by name, in the working directory; "name/": a folder
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return " ".join([self.command.removeprefix("distill --config sound.yaml "), *self.environment])[:100]


def recipe(overrides: str, *says: str, **rest: Mapping[str, str]) -> Refusal:
    files = {"sound.yaml": SOUND, **rest.pop("files", {})}
    return Refusal(f"distill --config sound.yaml {overrides}", says, files, **rest)


def finished(overrides: str, *says: str) -> Refusal:
    """A row about a run of two steps that has come to its end."""
    return Refusal(f"distill --config finished.yaml {overrides}", says, {"finished.yaml": FINISHED})


def prepare(options: str, *says: str, **rest: Mapping[str, str]) -> Refusal:
    options = options if "--images" in options else f"--images $images {options}"
    return Refusal(f"fpd-accel prepare --annotations $people --output shards {options}", says, **rest)


def evaluate(options: str, *says: str, **rest: Mapping[str, str]) -> Refusal:
    return Refusal(f"evaluate {options}", says, **rest)


def predict(options: str, *says: str, **rest: Mapping[str, str]) -> Refusal:
    options = options if "--model" in options else f"--model $tiny_w8 {options}"
    return Refusal(f"fpd-accel predict --output out {options}", says, **rest)


# --- recipes: keys and values ---------------------------------------------------------------------------------------

RECIPES = [
    recipe("train.stesp=3", "train.stesp: unknown key; did you mean 'steps'?"),
    recipe("qqqq=2", "qqqq: unknown key; choices: run, data"),
    recipe("1=2", "1: unknown key; choices: run, data"),
    recipe("train.qqqq=2", "train.qqqq: unknown key; choices: steps"),
    recipe("data.augment.qqqq=2", "data.augment.qqqq: unknown key; choices: flip"),
    recipe("train.steps", "train.steps: an override is key.path=value"),
    recipe("=3", "=3: an override is key.path=value"),
    recipe("train.steps=[1", "train.steps: … is not a YAML value"),
    recipe("distill.mode.x=3", "distill.mode.x: 'mode' is a value, not a section"),
    recipe("distill=3", "distill: … is not a section with keys mode, alpha"),
    recipe("train..steps=3", "train."),
    recipe("run.name=2024-13-45", "run.name: "),  # YAML takes it for a date, and there is no such date
    recipe("optim.name=qqqq", "optim.name: 'qqqq' is not a choice; choices: adam, adamw, sgd"),
    recipe("distill.mode=teach", "distill.mode: 'teach' is not a choice; … choices: fpd, normal"),
    recipe(
        "distill.alpha_schedule=linaer",
        "distill.alpha_schedule: 'linaer' is not a choice; … choices: constant, linear, cosine",
    ),
    recipe("train.precision=fp16", "train.precision: 'fp16' is not a choice; … choices: fp32, bf16"),
    recipe("optim.schedule=stepped", "optim.schedule: 'stepped' is not a choice; … choices: constant, step, cosine"),
    recipe("student.color=gray", "student.color: 'gray' is not a choice; … choices: rgb, bgr"),
    recipe("student.arch=hrnet_23", "student.arch: 'hrnet_23' is … hrnet_w32"),
    *(
        recipe(f"{path}={value}", f"{path}: ")
        for path, value in (
            ("distill.alpha", "1.01"),
            ("distill.alpha", "-0.1"),
            ("distill.alpha", ".nan"),
            ("data.augment.scale", "1"),
            ("data.augment.rotation", "181"),
            ("data.box_padding", "0.9"),
            ("data.unlabelled.share", "1 data.unlabelled.shards=$valid"),
            ("codec.sigma", "0"),
            ("train.global_batch", "0"),
            ("train.ema_decay", "1"),
            ("optim.lr", "0"),
            ("optim.lr", ".inf"),
            ("run.seed", "-1"),
            ("run.seed", str(2**32)),  # more than a generator takes
            ("run.name", "a/b"),
            ("run.name", ".."),  # the run directory would be the parent of run.root
            ("evaluate.batch", "1.5"),
        )
    ),
    recipe("distill.alpha=1.5", "distill.alpha: 1.5 … less than or equal to 1"),
    # All mistakes are listed at once; one wrong value does not accuse others, and does not hide them.
    recipe(
        "distill.alhpa=0.5 trian.steps=3 data.augment.flip=1.5 optim.name=adm student.arch=tiny_w9 "
        "train.global_batch=many",
        "data.augment.flip: 1.5",
        "distill.alhpa: unknown key; did you mean 'alpha'?",
        "train.global_batch: 'many' should be a valid integer",
        "optim.name: 'adm' is not a choice; did you mean 'adam'?",
        "trian: unknown key; did you mean 'train'?",
        "student.arch: 'tiny_w9' is not an architecture; did you mean 'tiny_w8'?",
    ),
    recipe("train.steps=abc", "train.steps: "),
    recipe("optim.schedule=cosin", "optim.schedule: "),
    recipe("distill.alpha_schedule=linaer distill.alpha_final=0.1", "distill.alpha_schedule: "),
    recipe("train.global_batch=0 data.input_size='[64, 66]'", "train.global_batch: ", "data.input_size: "),
    recipe(
        "distill.alpha=2 data.input_size='[64, 66]' student.arch=tiny_w9",
        "distill.alpha: 2",
        "data.input_size: … multiples of 4",
        "student.arch: … did you mean 'tiny_w8'?",
    ),
    # --- values that contradict each other
    recipe("train.epochs=2", "train.steps, train.epochs: … exactly one"),
    recipe("train.steps=null", "train.steps, train.epochs: … exactly one"),
    recipe("train.device_batch=7", "train.device_batch: 7 does not divide train.global_batch (96)"),
    recipe("optim.schedule=step", "optim.milestones: … needs them"),
    recipe("optim.schedule=step optim.milestones='[3, 2]'", "optim.milestones: [3.0, 2.0] do not increase"),
    recipe("optim.schedule=cosine optim.final_lr=1", "optim.final_lr: 1.0 is above optim.lr"),
    recipe("optim.warmup_steps=11", "optim.warmup_steps: 11 is more than train.steps (10)"),
    recipe("distill.alpha_final=0", "distill.alpha_final: … alpha_schedule"),
    recipe("distill.alpha_schedule=linear", "distill.alpha_final: … alpha_schedule"),
    recipe("distill.temperature=2", "distill.temperature: goes with distill.distance=kl"),
    recipe("distill.mode=fpd", "distill.mode: 'fpd' needs a teacher; set teacher.weights"),
    recipe("teacher.weights=a teacher.recipe=b", "teacher.weights, teacher.recipe: give one"),
    recipe("teacher.arch=hrnet_48", "teacher.arch: … did you mean 'hrnet_w48'?"),
    recipe("student.arch=hourglass_0x128", "student.arch: … at least 1 stack, not 0"),
    recipe("student.arch=hourglass_2x7", "student.arch: … multiple of 4 and at least 8, not 7"),
    recipe("student.arch=hourglass_1000x128", "student.arch: … not an architecture"),
    recipe("student.arch=hourglass_1x16 data.input_size='[96, 64]'", "data.input_size: … multiples of 64, not 96 x 64"),
    recipe("data.input_size='[64, 72]'", "data.input_size: … multiples of 16, not 64 x 72"),
    recipe("train.cuda_graphs=true train.compile=units", "train.cuda_graphs: goes with train.compile=whole, not units"),
    recipe("codec.name=simcc", "codec.name: 'simcc' does not fit 'tiny_w8'"),
    recipe("student.arch=tiny_w8_simcc", "codec.name: 'heatmap' does not fit 'tiny_w8_simcc'"),
    recipe("student.arch=tiny_w9_simcc codec.name=simcc", "student.arch: 'tiny_w9_simcc' is not an architecture"),
    recipe(
        "student.arch=tiny_w8_simcc codec.name=simcc distill.mode=fpd teacher.weights=$tiny_w16",
        "distill.distance: … takes distill.distance=kl",
    ),
    recipe("student.arch=tiny_w8_simcc codec.name=simcc distill.hard_keypoints=3", "distill.hard_keypoints: "),
    recipe(
        "student.arch=tiny_w8_simcc codec.name=simcc evaluate.scales='[1, 1.2]'", "evaluate.refine, evaluate.scales: "
    ),
    recipe("teacher.arch=tiny_w16_simcc", "teacher.codec.name: 'heatmap' does not fit 'tiny_w16_simcc'"),
    recipe("data.unlabelled.shards=$valid", "data.unlabelled: … need a teacher"),
    recipe(
        "data.unlabelled.shards=$valid distill.mode=fpd teacher.weights=$tiny_w16",
        "distill.mask: 'visible' counts labelled",
    ),
    recipe(
        "teacher.cache={} data.streaming=true distill.mode=fpd teacher.weights=$tiny_w16",
        "teacher.cache: … data.augment.views is not set",
        "teacher.cache: … data.streaming",
    ),
    recipe("teacher.cache.dtype=fp4", "teacher.cache.dtype: 'fp4' is not a choice"),
    # --- files
    recipe(
        "data.train=nowhere data.valid=shards/valid student.weights=finished.pth",
        "data.train: nowhere: no prepared dataset there … fpd-accel prepare",
        "data.valid: shards/valid: no prepared dataset there",
        "student.weights: finished.pth: no such file or model folder",
    ),
    recipe(
        "distill.mode=fpd teacher.weights=teacher.pth teacher.arch=tiny_w16",
        "teacher.weights: teacher.pth: no such file or model folder",
    ),
    recipe(
        "distill.mode=fpd teacher.weights=teacher.safetensors",
        "teacher.arch: missing; teacher.safetensors is a bare weights file",
        files={"teacher.safetensors": ""},
    ),
    recipe(
        "data.unlabelled.shards=nowhere distill.mode=fpd distill.mask=all teacher.weights=$tiny_w16",
        "data.unlabelled.shards: nowhere: no prepared dataset there",
    ),
    # --- the teacher's own recipe
    recipe(
        "distill.mode=fpd teacher.recipe=teacher.yaml",
        "teacher.recipe: teacher.yaml: this recipe cannot be used",
        "teacher.recipe: train.stesp: unknown key; did you mean 'steps'?",
        files={"teacher.yaml": TEACHER.replace("steps: 10", "stesp: 10")},
    ),
    recipe(
        "distill.mode=fpd teacher.recipe=taecher.yaml",
        "teacher.recipe: taecher.yaml: no such recipe; did you mean teacher.yaml?",
        files={"teacher.yaml": TEACHER},
    ),
    recipe(
        "distill.mode=fpd teacher.recipe=teacher.yaml",
        "teacher.recipe: teacher.yaml: writes to sound too; change run.name",
        files={"teacher.yaml": SOUND},
    ),
    recipe(
        "distill.mode=fpd teacher.recipe=teacher.yaml codec.name=udp data.input_size='[64, 128]'",
        "teacher.recipe: data.input_size is [64, 64] there, [64, 128] here",
        "teacher.recipe: codec.name is heatmap there, udp here",
        files={"teacher.yaml": TEACHER},
    ),
]

# --- recipes: the file ----------------------------------------------------------------------------------------------

FILES = [
    Refusal(
        "distill --config suond.yaml", ("suond.yaml: no such recipe; did you mean sound.yaml?",), {"sound.yaml": ""}
    ),
    Refusal("distill --config nowhere/sound.yaml", ("nowhere/sound.yaml: no such recipe",)),
    Refusal("distill --config folder", ("folder: no such recipe",), {"folder/": ""}),
    Refusal(
        "distill --config broken.yaml",
        ("broken.yaml: not readable as YAML … line 2",),
        {"broken.yaml": "run: {name: a}\ndata: {train: [}\n"},
    ),
    Refusal("distill --config bytes.yaml", ("bytes.yaml: not readable as YAML",), {"bytes.yaml": "run: \udcff\udcfe"}),
    *(
        Refusal(
            "distill --config list.yaml",
            ("list.yaml: a recipe is a mapping of sections (run, data, codec",),
            {"list.yaml": text},
        )
        for text in ("", "- a\n- b\n", "a word", "3")
    ),
]

# --- runs: processes, weights, and runs that exist -------------------------------------------------------------------

APART = {"WORLD_SIZE": "2", "ACCELERATE_USE_CPU": ""}  # of a launcher that Accelerate does not recognise
FPD = "distill.mode=fpd"
RUNS = [
    recipe("train.global_batch=5", "train.global_batch: 5 does not divide by 2 ranks; use 4 or 6", environment=APART),
    recipe("", "2 processes were started, but each trains alone", "ACCELERATE_USE_CPU=true", environment=APART),
    recipe(
        "",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set … unset it",
        environment={"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"},
    ),
    recipe("train.sync_norm=true", "train.sync_norm: … needs GPUs"),
    recipe("train.cuda_graphs=true train.compile=whole", "train.cuda_graphs: needs a single process on a GPU"),
    recipe("run.root=occupied", "occupied", files={"occupied": "a file"}),
    recipe("data.valid=$lsp_shards", "data.valid: … skeleton 'lsp', but data.train … 'coco'"),
    recipe("student.weights=$tiny_w16", "$tiny_w16: … another architecture, tiny_w16"),
    recipe("student.weights=$damaged", "$damaged: damaged, or not a safetensors file"),
    recipe(f"{FPD} teacher.weights=$bare teacher.arch=tiny_w32", "$bare: the weights do not fit", "tiny_w16"),
    recipe(
        f"{FPD} teacher.weights=$lsp_model", "trained on skeleton 'lsp' (14 keypoints), but the data have 'coco' (17)"
    ),
    recipe(f"{FPD} teacher.weights=$large_model", "takes [128, 96] (height, width), but data.input_size is [64, 64]"),
    recipe(f"{FPD} teacher.weights=folder", "folder: not a model folder (no config.json)", files={"folder/": ""}),
    recipe(f"{FPD} teacher.weights=$tiny_w16_simcc", "SimCC distributions, which a heatmap student cannot learn from"),
    recipe(f"{FPD} teacher.weights=$tiny_w16 codec.name=udp", "UDP heatmaps use another pixel grid"),
    recipe(f"{FPD} teacher.weights=$tiny_w16 distill.teacher_stage=each student.arch=hourglass_2x16", "as many stages"),
    recipe(
        f"{FPD} teacher.weights=$tiny_w16 distill.hard_keypoints=18",
        "hard_keypoints: 18, but the data have 17 keypoints",
    ),
    recipe(f"{FPD} teacher.weights=$bare teacher.arch=tiny_w16 codec.name=udp", "UDP heatmaps use another pixel grid"),
    recipe(
        f"{FPD} teacher.weights=$tiny_w16 teacher.arch=tiny_w32", "teacher.arch: tiny_w32, but $tiny_w16 is a tiny_w16"
    ),
    recipe(
        f"{FPD} teacher.weights=$tiny_w16_simcc teacher.cache={{}} student.arch=tiny_w8_simcc codec.name=simcc "
        "distill.distance=kl data.augment.views=4",
        "teacher.cache: stores heatmaps alone",
    ),
    finished(
        "optim.lr=0.5 data.augment.flip=0",
        "this run was begun by another recipe; choose another run.name, or undo",
        "optim.lr: 0.001 -> 0.5",
        "data.augment.flip: 0.5 -> 0.0",
    ),
    finished("--resume none", "finished: this run exists; continue it with --resume auto, or choose another run.name"),
    *(
        finished(f"--resume $run/{folder}", f"$run/{folder}: cannot be resumed")
        for folder in ("nowhere", "checkpoints", "checkpoints/latest")
    ),
    finished("data.train=$valid train.steps=3", "data.train is not what this run was begun with"),
    finished("train.steps=1", "already at step 2, but the recipe ends at step 1"),
    finished(
        "run.root=$spoilt",
        "step_00000002: passed over: student.safetensors has 0 bytes",
        "none of the 1 checkpoints is whole; remove them to start afresh",
    ),
]

# --- prepare and synth -----------------------------------------------------------------------------------------------

DATASETS = [
    prepare("--skeleton $lsp", "people.json: 17 keypoints, but skeleton 'lsp' has 14 … --skeleton"),
    prepare("--skeleton mine.yaml", "mine.yaml: no such skeleton"),
    prepare("--images imagse", "imagse: no such image folder"),
    prepare("--images empty", "empty: no image of … empty/a.jpg", files={"empty/": ""}),
    prepare("", "shards: exists", files={"shards/": ""}),
    Refusal("fpd-accel synth drawn --images 0", ("images=0 … give at least 1 image",)),
]

# --- evaluate --------------------------------------------------------------------------------------------------------

EVALUATIONS = [
    evaluate("--model folder --data $valid", "folder: not a model folder (no config.json)", files={"folder/": ""}),
    evaluate("--model $tiny_w8 --data nothing", "nothing: not a prepared dataset (no dataset.json)"),
    evaluate("--model $lsp_model --data $valid", "skeleton 'lsp' (14", "'coco' (17"),
    evaluate("--model $damaged_model --data $valid", "config.json: damaged"),
    evaluate(
        "--model model --data $valid", "skeleton: Field required", files={"model/config.json": '{"arch": "tiny_w8"}'}
    ),
    evaluate("--model $unknown_model --data $valid", "'tiny_w9' is not an architecture"),
    evaluate("--model a --data b --batch 0", "--batch is at least 1"),
    *(
        evaluate(f"--model a --data b --output {output}", words, files={"folder/": "", "file": ""})
        for output, words in (
            ("folder", "folder: is a folder; --output is the file to write"),
            ("file/people.json", "file: cannot be made: File exists"),
        )
    ),
    *(
        evaluate(f"--model a --data b {option}", words)
        for option, words in (
            ("nms=soft nms_threshold=0", "evaluate.nms_threshold: must be above 0 for soft suppression"),
            ("nms_threshold=1.5", "evaluate.nms_threshold: 1.5 should be less than or equal to 1"),
            ("nms_threshold=.nan", "evaluate.nms_threshold: nan should be a finite number"),
            ("box_threshold=.inf", "evaluate.box_threshold: inf should be a finite number"),
            ("scales='[0.9, 1.1]'", "evaluate.scales: [0.9, 1.1]: 1.0 has to be among them"),
            ("scales='[1, .nan]'", "evaluate.scales.1: nan should be"),
            ("evaluate.nms=weak", "evaluate.nms: 'weak' is not a choice; choices: hard, soft, none"),
            ("nms_treshold=1", "evaluate.nms_treshold: unknown key; did you mean 'nms_threshold'?"),
            ("nms", "evaluate.nms: an override is key.path=value"),
            ("--nms soft", "--nms: removed in 0.2: write nms=soft instead"),
            ("--nms-threshold=0.8", "--nms-threshold: removed in 0.2: write nms_threshold=0.8 instead"),
            ("--box-threshold 0.1", "--box-threshold: removed in 0.2: write box_threshold=0.1 instead"),
            ("--keypoint-threshold 0", "--keypoint-threshold: removed in 0.2: write keypoint_threshold=0 instead"),
            ("--scales 1 1.1", "--scales: removed in 0.2: write scales='[1,1.1]' instead"),
            ("--refine dark", "--refine: removed in 0.2: write refine=dark instead"),
            ("--stages mean", "--stages: removed in 0.2: write stages=mean instead"),
            ("--flip-shift", "--flip-shift: removed in 0.2: write flip_shift=true instead"),
            ("--no-flip-shift", "--no-flip-shift: removed in 0.2: write flip_shift=false instead"),
        )
    ),
    evaluate(
        "--model a --data b nms=weak stages=first color=red",
        "these options cannot be used",
        "  evaluate.nms: ",
        "  evaluate.stages: ",
        "  evaluate.color: ",
    ),
    *(
        evaluate("--model $tiny_w8 --data $valid --boxes boxes.json --output people.json", words, files=files)
        for files, words in (
            ({}, "boxes.json: no such file of boxes; `fpd-accel detect` writes one"),
            ({"boxes.json": "{"}, "boxes.json: not readable as JSON"),
            ({"boxes.json": "{}"}, "boxes.json: not a list of boxes in COCO's result format"),
            (
                {"boxes.json": '[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}]'},
                "boxes.json: box 0 of 1: score missing",
            ),
            (
                {"boxes.json": '[{"image_id": -1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]'},
                "none of its 1 boxes can be used",
            ),
        )
    ),
]

# --- predict ---------------------------------------------------------------------------------------------------------

BOX = '{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}'
MAPPING = "boxes.json: wanted a mapping from file name to a list"
PREDICTIONS = [
    predict("$images/a.jpg --model none", "none: not a model folder"),
    predict("nothing.jpg", "nothing.jpg: no such image"),
    predict("$people", "$people: not an image that can be decoded"),
    predict("$images/a.jpg --device gpu", "gpu"),
    predict("$images/a.jpg --device cuda:99", "cuda:99"),
    predict("$images/a.jpg --output $people", "$people/a.png: cannot be written: File exists"),
    predict("$images/a.jpg --boxes $people", "$people: wanted a mapping from file name to a list"),
    predict("$images/a.jpg --boxes nothing.json", "nothing.json: not readable as JSON"),
    *(
        predict("$images/a.jpg --boxes boxes.json", words, files={"boxes.json": text})
        for text, words in (
            ('{"a.jpg": [1, 2, 3, 4]}', MAPPING),
            ('{"a.jpg": [["x", "y", "w", "h"]]}', "boxes.json"),
            ('{"a.jpg": 5}', MAPPING),
            (f'{{"a.jpg": [[1, 2, 3, {10**400}]]}}', MAPPING),
            ("[" * 10**6, "boxes.json: not readable as JSON"),
            (f"[{BOX}]", "boxes.json: its boxes have no file_name"),
            ("[]", "boxes.json: an empty list"),
            ('{"a.jpg": [[1, 2, 0, 4]]}', "positive width and height"),
        )
    ),
    # Images are looked at before a model is loaded.
    predict("$images/a.jpg missing.jpg --model none", "missing.jpg: no such image"),
    predict(
        "$images/a.jpg $other/a.png --model none", "$images/a.jpg and $other/a.png would both be drawn to out/a.png"
    ),
    predict("$images/a.jpg $images/a.jpg --model none", "would both be drawn"),
    predict("$other/a.png --model none --output $other", "$other/a.png: its overlay would replace it"),
]

REFUSALS = [*RECIPES, *FILES, *RUNS, *DATASETS, *EVALUATIONS, *PREDICTIONS]
