"""A data source of pictures of many sizes, made up in memory: also a file beside a recipe."""

import threading

import torch
from pydantic import PositiveInt

from sslkit.api import DataSource
from sslkit.errors import RunFailed


class Pictures:
    """N pictures, each of a size and a colour of its own."""

    def __init__(self, n, size=16, channels=3, workers=2, seed=0):
        drawn = torch.Generator().manual_seed(seed)
        self.sizes = torch.randint(12, 70, (n, 2), generator=drawn, dtype=torch.int32)
        self.pictures = [
            torch.randint(0, 256, (channels, *side), generator=drawn, dtype=torch.uint8) for side in self.sizes.tolist()
        ]
        for number, picture in enumerate(self.pictures):
            picture[0] = number % 250
        self.labels, self.tensor = torch.arange(n) % 4, None
        self.size, self.workers, self.broken = size, workers, None
        self.asked, self.threads = [], set()

    def __len__(self):
        return len(self.pictures)

    def original(self, index):
        self.asked.append(index)
        self.threads.add(threading.current_thread().name)
        if index == self.broken:
            raise RunFailed(f"picture {index} holds another image than when the run began")
        return self.pictures[index]

    def read(self, indices):
        squares = []
        for picture in (self.pictures[i] for i in indices.tolist()):
            side = min(picture.shape[1:])
            square = picture[None, :, :side, :side].float()
            squares.append(torch.nn.functional.interpolate(square, (self.size, self.size))[0].byte())
        return torch.stack(squares)


class Opened:
    class_names, fingerprint, bad = None, "made up", ()

    def __init__(self, train, test):
        self.train, self.test = train, test


class Made(DataSource):
    """Pictures of many sizes."""

    workers: PositiveInt = 2
    """Threads that cut."""
    channels: PositiveInt = 3
    """Of each picture."""

    def build(self, info):
        made = (Pictures(n, 16, self.channels, self.workers, n) for n in (96, 40))
        return Opened(*made)
