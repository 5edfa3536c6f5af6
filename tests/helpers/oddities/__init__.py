"""Labels as people's tools write them: one list of oddities, for COCO, VOC and YOLO, with what is right for each."""

from helpers.oddities.coco import COCO
from helpers.oddities.oddity import Oddity
from helpers.oddities.voc import VOC
from helpers.oddities.yolo import YOLO

ODDITIES: tuple[Oddity, ...] = (*COCO, *VOC, *YOLO)
