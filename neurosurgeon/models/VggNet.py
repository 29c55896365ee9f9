"""VGG-16 with batch norm (Simonyan & Zisserman 2015), with torchvision's parameter names."""

from __future__ import annotations

from torch import nn

from neurosurgeon.models.chain import ChainNetwork

# Output channels of each convolution; "M" is a 2x2 max pooling.
PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def _features() -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for step in PLAN:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
            continue
        layers += [
            nn.Conv2d(channels, step, kernel_size=3, padding=1),
            nn.BatchNorm2d(step),
            nn.ReLU(inplace=True),
        ]
        channels = step
    return nn.Sequential(*layers)


class VggNet(ChainNetwork):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = _features()  # (N, 3, 224, 224) -> (N, 512, 7, 7)
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )

    def layers(self) -> list[nn.Module]:
        return [*self.features, self.avgpool, self.flatten, *self.classifier]
