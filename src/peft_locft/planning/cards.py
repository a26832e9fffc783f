"""The memory of common accelerators."""

from __future__ import annotations

from dataclasses import dataclass


GIB = 2**30
# What the driver's context, the libraries' workspaces and the allocator's gaps take beside the tensors: about 0.3 to 0.5
# GiB for the CUDA context of a process that runs torch, and some more.
RESERVED = int(0.6 * GIB)
# From the makers' data sheets, in GB: nvidia.com (T4, L4, GeForce RTX 4090 and 5090, A100, L40S, H100 SXM, H200 SXM, DGX
# B200) and amd.com (Instinct MI300X). They are taken as 10**9 bytes, the least that they can mean: a process never gets
# less, and error correction takes its share of some.
_GIGABYTES = {
    "T4": 16,
    "L4": 24,
    "RTX 4090": 24,
    "RTX 5090": 32,
    "A100 40 GB": 40,
    "L40S": 48,
    "A100 80 GB": 80,
    "H100": 80,
    "H200": 141,
    "B200": 180,
    "MI300X": 192,
}


@dataclass(frozen=True)
class CardFit:
    """Whether a card has room for an edit.

    Args:
        card (`str`):
            The card's name.
        memory (`int`):
            Its memory in bytes.
        plain (`bool`):
            Whether all phases fit with the whole model on the card.
        offloaded (`bool`):
            Whether they fit with `offload_prefix`.
    """

    card: str
    memory: int
    plain: bool
    offloaded: bool


def card_fits(plain: int, offloaded: int | None) -> tuple[CardFit, ...]:
    """Compare what an edit takes with common cards.

    Args:
        plain (`int`):
            The bytes that it takes with the whole model on the card.
        offloaded (`int`, *optional*):
            The same with `offload_prefix`. `None` where that is not possible.

    Returns:
        `tuple[CardFit, ...]`: For each card, the smallest first. 0.6 GiB of each are left free.
    """
    fits = []
    for card, gigabytes in _GIGABYTES.items():
        room = gigabytes * 10**9 - RESERVED
        fits.append(CardFit(card, gigabytes * 10**9, plain <= room, offloaded is not None and offloaded <= room))
    return tuple(fits)
