"""Evaluation of a network on prepared people: COCO's AP, PCK and MPII's PCKh."""
