"""Write people, a teacher and the recipes of the killed run and of the undisturbed one."""

from pathlib import Path

EVERY = 3  # steps between checkpoints
KEEP = 2


def prepare(work: Path, *, steps: int) -> None:
    """Write everything into the folder `work`, for runs of that many steps.

    The runs are evaluated on people that they train on, so that scores rise and `best/` is written often.
    """
    import torch
    import yaml

    from fpd_accel.data.coco import prepare_coco
    from fpd_accel.models.create import create_model
    from fpd_accel.skeleton import COCO
    from fpd_accel.synthetic.dataset import draw_dataset
    from fpd_accel.weights.model_folder import ModelConfig, save_model

    for name, images in (("train", 12), ("valid", 6)):
        drawn = draw_dataset(work / name / "coco", images=images, seed=0, image_size=(120, 160))
        annotations = drawn / "person_keypoints.json"
        prepare_coco(images=drawn / "images", annotations=annotations, output=work / name / "shards")
    torch.manual_seed(0)
    config = ModelConfig(arch="tiny_w16", skeleton=COCO, input_size=(64, 64))
    save_model(work / "teacher", create_model("tiny_w16", 17).state_dict(), config)
    for name, keep in (("whole", steps), ("killed", KEEP)):
        recipe = {
            "run": {"name": name, "root": str(work), "seed": 1},
            "data": {
                "train": str(work / "train" / "shards"), "valid": str(work / "valid" / "shards"),
                "input_size": [64, 64], "workers": 1,
                "augment": {"scale": 0.1, "rotation_probability": 0.2, "half_body": 0.1},
            },
            "student": {"arch": "tiny_w32"},
            "teacher": {"weights": str(work / "teacher")},
            "distill": {"alpha": 0.1, "alpha_final": 0.05, "alpha_schedule": "linear"},
            "train": {"steps": steps, "global_batch": 4, "ema_decay": 0.95, "clip_norm": 1.0},
            "optim": {"name": "adamw", "lr": 0.002, "weight_decay": 0.01, "schedule": "cosine", "warmup_steps": 3},
            "evaluate": {"every_epochs": 1, "batch": 8},
            "log": {"every_steps": 1, "pictures_every_steps": 20},
            "checkpoint": {"every_steps": EVERY, "keep": keep},
        }  # fmt: skip
        (work / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
