"""Score a model folder on prepared people by COCO's protocol, and by MPII's if the people have head sizes.

accelerate launch recipes/evaluate.py --model runs/quickstart/best --data runs/synthetic/valid
accelerate launch recipes/evaluate.py --model FOLDER --data data/coco/val2017 --boxes detections.json nms=soft
accelerate launch recipes/evaluate.py --help
"""

import sys

from fpd_accel.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
