"""Pictures and sounds that ship as code: always the same, with edges, gradients and pitches, and nobody's property."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RATE = 16_000
"""Samples of a sound per second."""


def picture(number: int, *, channels: int, height: int, width: int) -> Tensor:
    """Picture `number`: waves of its own directions with two rectangles on them, (channels, height, width) in [-1, 1].

    That is the range image processors leave, whichever mean and deviation they use.
    """
    down = torch.linspace(0, 1, height, dtype=torch.float64)[:, None]  # (height, 1)
    across = torch.linspace(0, 1, width, dtype=torch.float64)[None, :]  # (1, width)
    layers = []
    for channel in range(channels):
        turn = 0.7 * number + 2.1 * channel
        waves = 2 + (number + channel) % 5
        wave = torch.sin(2 * math.pi * waves * (math.cos(turn) * across + math.sin(turn) * down) + turn)
        for at in range(2):
            left, top = (0.13 * number + 0.37 * at) % 0.7, (0.29 * number + 0.41 * at) % 0.7
            inside = (across >= left) & (across < left + 0.3) & (down >= top) & (down < top + 0.3)
            wave = torch.where(inside, torch.tensor(math.cos(turn + 2.5 * at), dtype=wave.dtype), wave)
        layers.append(wave)
    return torch.stack(layers).float()


def sound(number: int, samples: int) -> Tensor:
    """Sound `number`: three gliding, beating tones, (samples,) in [-1, 1] at `RATE` samples per second."""
    seconds = torch.arange(samples, dtype=torch.float64) / RATE
    total = torch.zeros_like(seconds)
    for voice in range(3):
        pitch = 110 * 1.31 ** ((number + 3 * voice) % 9)
        glide = 1 + 0.05 * torch.sin(2 * math.pi * (0.4 + 0.1 * number) * seconds)
        beat = 0.5 + 0.5 * torch.sin(2 * math.pi * (1.5 + voice) * seconds + number)
        total += beat * torch.sin(2 * math.pi * pitch * glide * seconds) / 3
    return total.float()
