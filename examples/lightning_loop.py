"""Fine-tune a pre-trained detector with Lightning, then keep it as a weights.pt (pip install lightning).

python examples/lightning_loop.py workspace/pretrain-box/retinanet-resnet50 coco/ --split train2017
"""

from typing import Any

import lightning
import torch
from torch.optim.lr_scheduler import LinearLR
from torchvision_loop import load, read_words

import aligndet_cli as aligndet


class Finetuning(lightning.LightningModule):
    """The losses of a detector, and RetinaNet's optimizer after pre-training."""

    def __init__(self, detector: aligndet.ImageDetector, batch_size: int) -> None:
        super().__init__()
        self.detector, self.batch_size = detector, batch_size

    def training_step(self, batch: Any, _number: int) -> torch.Tensor:
        """Return the scalar sum of the losses, and log each."""
        images, targets = batch
        losses = self.detector(images, targets)
        self.log_dict(losses, prog_bar=True, batch_size=self.batch_size)
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> Any:
        """Return SGD, at a rate that rises for the first 500 steps."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.015 * self.batch_size / 16, momentum=0.9, weight_decay=5e-5)
        warmup = LinearLR(optimizer, start_factor=0.001, total_iters=500)
        return [optimizer], [{"scheduler": warmup, "interval": "step"}]


def main() -> None:
    """Read the words of the command line, train, and save."""
    asked = read_words(__doc__.splitlines()[0])
    detector, loader = load(asked)
    trainer = lightning.Trainer(max_epochs=asked.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(Finetuning(detector, asked.batch_size), loader)
    told = ", ".join(f"{name} {float(value):.3f}" for name, value in trainer.logged_metrics.items())
    detector.save(asked.output)
    print(f"{told}; {asked.output}: try aligndet predict --weights {asked.output} IMAGES")


if __name__ == "__main__":
    main()
