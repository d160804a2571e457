"""Benchmarks of the loader, the training step and the evaluation on this machine."""

VARIANTS = {  # of a step, by name
    "published": "fp32, teacher with gradients, loss joint by joint, three .item(), accuracy on the host",
    "published_no_grad": "the same, teacher without gradients",
    "eager": "eager (autocast in bf16), teacher without gradients, loss at once, .item()",
    "ours": "the step of this trainer",
    "ours_cached": "the same, with the teacher's outputs in memory as its cache stores them (teacher.cache, bf16)",
}
