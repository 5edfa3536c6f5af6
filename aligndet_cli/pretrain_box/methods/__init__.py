"""The methods of `pretrain-box`, one file each. A new one is one more class and one more line here."""

from aligndet_cli.pretrain_box.method import Method
from aligndet_cli.pretrain_box.methods.aligndet import AlignDet
from aligndet_cli.pretrain_box.methods.classes import Classes
from aligndet_cli.pretrain_box.methods.detreg import DETReg
from aligndet_cli.pretrain_box.methods.soco import SoCo
from aligndet_cli.pretrain_box.methods.up_detr import UPDETR
from aligndet_cli.pretrain_box.recipes import MethodName

METHODS: dict[MethodName, Method] = {
    "aligndet": AlignDet(),
    "classes": Classes(),
    "detreg": DETReg(),
    "up-detr": UPDETR(),
    "soco": SoCo(),
}

__all__ = ["METHODS"]
