"""LeNet-5 (LeCun 1998), scaled to colour images of 224x224 and 1000 classes, with ReLU."""

from __future__ import annotations

from torch import nn

from neurosurgeon.models.chain import ChainNetwork


class LeNet(ChainNetwork):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(  # (N, 3, 224, 224)
            nn.Conv2d(3, 6, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=2, stride=2),  # (N, 6, 112, 112)
            nn.Conv2d(6, 16, kernel_size=5),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=2, stride=2),  # (N, 16, 54, 54)
        )
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(16 * 54 * 54, 120),  # 46656 inputs
            nn.ReLU(inplace=True),
            nn.Linear(120, 84),
            nn.ReLU(inplace=True),
            nn.Linear(84, num_classes),
        )

    def layers(self) -> list[nn.Module]:
        return [*self.features, self.flatten, *self.classifier]
