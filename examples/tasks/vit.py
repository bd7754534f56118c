"""A vision transformer on handwritten digits: a DataLoader with workers, whose dataset augments at random.

steppe compare vit:task --methods base sam --epochs 10 --seeds 3
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset

from steppe.experiments import Metric, Task, accuracy


class Digits(Dataset):
    """Digits of 8 x 8 pixels; for training, each is moved by up to a pixel each time it is read."""

    def __init__(self, images, labels, augment):
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = self.images[i]
        if self.augment:
            top, left = torch.randint(3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]
        return image, self.labels[i]


class ViT(nn.Module):
    """A linear map of each patch of 2 x 2, two layers of attention over the 16 patches, their mean, a linear head."""

    def __init__(self, width=32):
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images):
        """Return the logits of images."""
        patches = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.encoder(patches + self.places).mean(1))


def task() -> Task:
    """Return the task."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train = Digits(images[:900], labels[:900], augment=True)
    test = Digits(images[900:], labels[900:], augment=False)
    return Task(
        name="vit",
        model=ViT,
        train=DataLoader(train, batch_size=64, shuffle=True, num_workers=1, persistent_workers=True),
        test=DataLoader(test, batch_size=256),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        metrics={"accuracy": Metric(accuracy, unit="%")},
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05),
        schedule="cosine",
    )
