"""Adapter ⇄ token matrix.

In: {site: (A, B)}.  Out: tokens (site, width) float32, one row per site in `AdapterSpec.sites` order;
narrower sites are padded with zeros (`AdapterCodec.mask`).
Idea: the coordinates of one gauge (gauge.py) are projected on the strongest directions of the training
adapters (subspace.py) and divided by one scale per site. Nothing is centred: zero tokens are the origin.
Inverse: `decode`, exact in ΔW at full width up to float32 rounding.
Source: METHOD.md §6.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ltdi_peft.batched import Stacked, unstacked
from ltdi_peft.files import replacing
from ltdi_peft.gauge import (
    Frame,
    Stream,
    block_weights,
    float32_copy,
    require_gauge,
    require_spec_sites,
    site_frames,
)
from ltdi_peft.int8 import packed, unpacked
from ltdi_peft.spec import Adapter, AdapterSpec, BrokenAdapterError, Sites
from ltdi_peft.subspace import (
    StreamingSubspace,
    fit_bases,
    one_pass,
    require_same_count,
    site_groups,
)

FORMAT_VERSION = 1
ORIGIN_VERSION = 2  # of a codec that counts from an origin
PACKED_VERSION = 3  # of one whose bases are stored in 8 bits, with or without an origin
HEADER = "ltdi_codec"  # the one key of the file's metadata; its value is JSON
BASIS_DTYPES = {"float32": torch.float32, "float16": torch.float16}
CPU = torch.device("cpu")
TOGETHER = 32  # adapters that are encoded in one matrix product


@dataclass(frozen=True, eq=False)
class _Row:
    """One token row, on one device in one dtype: token ⇄ coordinates."""

    frame: Frame
    basis: Float[Tensor, "used dim"] | None  # None: the identity
    gram: Float[Tensor, "used used"] | None  # Cholesky factor of basis·basisᵀ (the identity but for rounding)
    used: int  # numbers of the token that are not padding
    scale: float

    def coordinates(self, token: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        x = token[:, : self.used] * self.scale
        return x if self.basis is None else x @ self.basis

    def tokens(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch used"]:
        """The tokens whose coordinates are nearest to x: encode(decode(z)) = z also for a float16 basis."""
        if self.basis is None or self.gram is None:
            return x / self.scale
        inner = self.basis @ x.to(self.basis.dtype).mT
        return torch.cholesky_solve(inner, self.gram).mT / self.scale


class _TokenEnergy:
    """Sums ‖token‖² of one site over a pass. A basis is some MB: read once for `TOGETHER` adapters."""

    def __init__(self, row: _Row) -> None:
        self.row = row
        self._energy = 0.0
        self._waiting: list[Tensor] = []

    def add(self, x: Float[Tensor, " dim"]) -> None:
        self._waiting.append(x)
        if len(self._waiting) == TOGETHER:
            self._measure()

    def _measure(self) -> None:
        if self._waiting:
            self._energy += float(self.row.tokens(torch.stack(self._waiting)).double().square().sum())
            self._waiting.clear()

    @property
    def energy(self) -> float:
        """Of all that was added."""
        self._measure()
        return self._energy


@dataclass(frozen=True, eq=False)
class AdapterCodec:
    """Adapter ⇄ tokens (site, width) in one gauge, fitted on training adapters only. From `fit` or `load`."""

    spec: AdapterSpec
    gauge: str
    width: int
    start: Adapter | None  # θ_0; the reference in gauge `reference`; None in gauge `canonical`
    block_weights: Float[Tensor, "site 2"]  # (w_A, w_B) of the coordinates, float64; shared_a uses none
    bases: tuple[Tensor | None, ...]  # per site (used, dim), orthonormal rows; None: the identity
    scale: Float[Tensor, " site"]  # x = scale · basisᵀ · token: training tokens have rms 1 per site
    energy_kept: Float[
        Tensor, " site"
    ]  # share of the training coordinates' energy that the width keeps, 0 … 1
    origin: Adapter | None = None  # gauge `shared_a`: what tokens are counted from; None: the start
    int8: bool = False  # bases are stored in 8 bits (int8.py), and hold no more than that
    frames: tuple[Frame, ...] = field(init=False, repr=False)
    _placed: dict[tuple[torch.device, torch.dtype], tuple[_Row, ...]] = field(
        default_factory=dict, init=False, repr=False
    )
    _grams: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        require_gauge(self.gauge, self.start)
        frames = site_frames(self.spec, self.gauge, self.start, self.block_weights, self.origin)
        object.__setattr__(self, "frames", frames)

    @classmethod
    def fit(
        cls,
        stream: Stream,
        spec: AdapterSpec,
        start: Adapter | None,
        *,
        gauge: str,
        width: int | None,
        memory_budget: int = 2**30,
        basis_dtype: str = "float32",
        progress: bool = False,
    ) -> "AdapterCodec":
        """Fit directions and scales on the training adapters of `stream`.

        start: θ_0 in the shared gauges, the reference in gauge `reference`, None in `canonical`. width:
        numbers per token; None: as many as the widest site has coordinates, for an exact inverse.
        memory_budget: bytes of buffers at a time; less means more passes, each of which asks the adapters for
        its own sites alone (the result, width · coordinates numbers a site, comes on top). basis_dtype:
        "float16" halves the codec. Raises ValueError for an unknown gauge, a stream that is empty or cannot
        be repeated, adapters that do not fit `spec`, a budget too small for one site.
        """
        require_gauge(gauge, start)
        _require_choices(spec, width, basis_dtype)
        start = float32_copy(start, spec)
        weights = block_weights(stream, spec, start, gauge)
        frames = site_frames(spec, gauge, start, weights)
        subspaces = [StreamingSubspace(frame.dim, width or frame.dim) for frame in frames]
        bar = "codec" if progress else None
        dtype = BASIS_DTYPES[basis_dtype]
        bases, kept, count = fit_bases(stream, spec, frames, subspaces, memory_budget, bar, dtype)
        unit = torch.ones(len(frames))
        width = width or max(frame.dim for frame in frames)
        codec = cls(spec, gauge, width, start, weights, tuple(bases), unit, unit)
        kept = codec._measured(kept, subspaces, stream, count, memory_budget, bar)
        energy = torch.tensor([subspace.energy for subspace in subspaces], dtype=torch.float64)
        return codec._scaled(kept, energy, count)

    def _measured(
        self,
        kept: Float[Tensor, " site"],
        subspaces: Sequence[StreamingSubspace],
        stream: Stream,
        count: int,
        memory_budget: int,
        bar: str | None,
    ) -> Float[Tensor, " site"]:
        """`kept`, with what the merges dropped, missing in it so far, measured in as many passes again."""
        kept = kept.clone()
        # A basis and `TOGETHER` vectors are smaller than the buffers that the basis came from.
        for group in site_groups(subspaces, self.spec, memory_budget):
            lossy = [i for i in group if subspaces[i].lost > 1e-6 * subspaces[i].energy]
            if not lossy:
                continue
            meters = [_TokenEnergy(self._encoding_row(i)) for i in lossy]
            feeds = [(self.frames[i], meter.add) for i, meter in zip(lossy, meters, strict=True)]
            require_same_count({count, one_pass(stream, self.spec, feeds, bar)})
            kept[lossy] = torch.tensor([meter.energy for meter in meters], dtype=torch.float64)
        return kept

    def _scaled(
        self, kept: Float[Tensor, " site"], energy: Float[Tensor, " site"], count: int
    ) -> "AdapterCodec":
        """With the scales of `count` training adapters; a site that never left the origin has scale 1."""
        scale = (kept / (count * self.mask.sum(1).clamp_min(1))).sqrt().float()
        share = torch.where(energy > 0, kept / energy, 1.0).clamp_max(1.0).float()
        # A new object: the buffers in _placed belong to the old scale.
        return replace(self, scale=torch.where(scale > 0, scale, 1.0), energy_kept=share)

    @property
    def mask(self) -> Bool[Tensor, "site width"]:
        """True where a token holds a number, False where it is padding (always zero)."""
        sizes = zip(self.frames, self.bases, strict=True)
        used = torch.tensor([frame.dim if basis is None else len(basis) for frame, basis in sizes])
        return torch.arange(self.width) < used[:, None]

    def encode(self, adapter: Sites, where: str = "adapter") -> Float[Tensor, "site width"]:
        """Float32 tokens on the CPU. Raises ValueError, naming `where`, for an adapter that does not fit."""
        return self._encoded([(adapter, where)])[0]

    def encode_many(self, adapters: Iterable[Sites]) -> Float[Tensor, "adapter site width"]:
        """`encode` of each, up to rounding; at most `TOGETHER` adapters are in memory at a time.

        A basis is some MB a site: read once for many adapters instead of once for each.
        """
        named = ((adapter, f"adapter {i}") for i, adapter in enumerate(adapters, start=1))
        parts = [self._encoded(part) for part in iter(lambda: list(islice(named, TOGETHER)), [])]
        return torch.cat([torch.zeros(0, len(self.frames), self.width), *parts])

    def _encoded(self, adapters: Sequence[tuple[Sites, str]]) -> Float[Tensor, "adapter site width"]:
        """Tokens of adapters, each with the words that name it in an error."""
        for adapter, where in adapters:
            require_spec_sites(adapter, self.spec, where)
        tokens = torch.zeros(len(adapters), len(self.frames), self.width)
        for site, frame in enumerate(self.frames):
            row = self._encoding_row(site)
            x = torch.empty(len(adapters), frame.dim, dtype=torch.float64)
            for vector, (adapter, where) in zip(x, adapters, strict=True):
                frame.coordinates(adapter, where, vector)
            tokens[:, site, : row.used] = row.tokens(x)
        return tokens

    def _encoding_row(self, site: int) -> _Row:
        """One site's float32 row. Not kept: all of them are twice the bytes of a float16 codec."""
        if placed := self._placed.get((CPU, torch.float32)):
            return placed[site]
        with torch.inference_mode(False), torch.no_grad():
            return self._row(site, self.frames[site], CPU, torch.float32)

    def _row(self, site: int, frame: Frame, device: torch.device, dtype: torch.dtype) -> _Row:
        basis, scale = self.bases[site], float(self.scale[site])
        if basis is None:
            return _Row(frame, None, None, frame.dim, scale)
        if site not in self._grams:
            exact = basis.double()
            self._grams[site] = torch.linalg.cholesky(exact @ exact.mT)
        return _Row(frame, basis.to(device, dtype), self._grams[site].to(device, dtype), len(basis), scale)

    def decode(self, tokens: Float[Tensor, "site width"]) -> Adapter:
        """The adapter of the tokens: float32, CPU, contiguous. decode(0) is the gauge's origin."""
        return next(self.decode_many(tokens[None]))

    def nothing(self) -> Adapter:
        """What zero tokens mean: the adapter that differences are added to."""
        return self.decode(torch.zeros(len(self.frames), self.width))

    def decode_many(self, tokens: Float[Tensor, "batch site width"]) -> Iterator[Adapter]:
        """`decode` of each, up to rounding."""
        for factors in self.decode_batches(tokens):
            yield from unstacked(factors)

    def decode_batches(self, tokens: Float[Tensor, "batch site width"]) -> Iterator[Stacked]:
        """`decode_factors` of up to `TOGETHER` at a time, for which a basis is read once; in float32."""
        if not tokens.isfinite().all():
            raise BrokenAdapterError("tokens to decode hold NaN or infinity; expected finite numbers.")
        for part in tokens.detach().float().split(TOGETHER):
            with torch.no_grad():
                yield self.decode_factors(part)

    def decode_factors(self, tokens: Float[Tensor, "batch site width"]) -> Stacked:
        """Differentiable `decode` of a batch, on the tokens' device and in their dtype: {site: (A, B)}.

        In gauge `shared_a` A is a view of the start's A, without a gradient. Raises ValueError for tokens of
        another shape.
        """
        expected = (len(self.frames), self.width)
        if tuple(tokens.shape[1:]) != expected:
            raise ValueError(
                f"tokens have (site, width) = {tuple(tokens.shape[1:])}, this codec's have {expected}. They "
                f"come from another codec: encode again with this one."
            )
        rows = self._at(tokens.device, tokens.dtype)
        pairs = zip(rows, tokens.unbind(1), strict=True)
        return {row.frame.site.name: row.frame.factors(row.coordinates(token)) for row, token in pairs}

    def _at(self, device: torch.device, dtype: torch.dtype) -> tuple[_Row, ...]:
        """Buffers of every site, made once per device and dtype."""
        if (device, dtype) not in self._placed:
            # A tensor made in inference mode could not take part in a later backward pass.
            with torch.inference_mode(False), torch.no_grad():
                frames = [frame.to(device, dtype) for frame in self.frames]
                rows = [self._row(i, frame, device, dtype) for i, frame in enumerate(frames)]
                self._placed[device, dtype] = tuple(rows)
        return self._placed[device, dtype]

    def save(self, path: Path | str) -> None:
        """One safetensors file, written whole or not at all; equal codecs give equal bytes."""
        table = {"scale": self.scale, "energy_kept": self.energy_kept, "block_weights": self.block_weights}
        for site, basis in zip(self.spec.sites, self.bases, strict=True):
            if basis is not None:
                one = {f"{site.name}.basis": basis.contiguous()}
                table |= packed(one) if self.int8 else one
            if self.start is not None:
                table[f"{site.name}.lora_A"], table[f"{site.name}.lora_B"] = self.start[site.name]
            if self.origin is not None:
                table[f"{site.name}.origin_A"], table[f"{site.name}.origin_B"] = self.origin[site.name]
        version = FORMAT_VERSION if self.origin is None else ORIGIN_VERSION
        version = PACKED_VERSION if self.int8 else version
        about = {"format_version": version, "gauge": self.gauge, "width": self.width}
        # One key only: safetensors writes several in the random order of a hash map.
        metadata = {HEADER: json.dumps({**about, "spec": self.spec.to_dict()}, sort_keys=True)}
        with replacing(Path(path)) as partial:
            save_file(table, partial, metadata=metadata)

    @classmethod
    def load(cls, path: Path | str, *, gauge: str | None = None) -> "AdapterCodec":
        """The inverse of `save`; `gauge`: the one expected. Raises ValueError for a damaged file."""
        header, table = _read(Path(path))
        if gauge is not None and header["gauge"] != gauge:
            raise ValueError(
                f"{path}: this codec has gauge {header['gauge']!r}, expected {gauge!r}. Tokens of one gauge "
                f"mean nothing in another: fit a codec with gauge {gauge!r}."
            )
        spec, start, origin = AdapterSpec.from_dict(header["spec"]), None, None
        try:
            if header["gauge"] != "canonical":
                start = {s.name: (table[f"{s.name}.lora_A"], table[f"{s.name}.lora_B"]) for s in spec.sites}
            if f"{spec.sites[0].name}.origin_A" in table:
                origin = {
                    s.name: (table[f"{s.name}.origin_A"], table[f"{s.name}.origin_B"]) for s in spec.sites
                }
            scale, kept, weights = table["scale"], table["energy_kept"], table["block_weights"]
        except KeyError as error:
            raise ValueError(f"{path}: tensor {error} is missing. Fit the codec again.") from error
        bases = tuple(table.get(f"{site.name}.basis") for site in spec.sites)
        stored = spec, header["gauge"], header["width"], start, weights, bases, scale, kept, origin
        codec = cls(*stored, int8=header["format_version"] == PACKED_VERSION)
        for frame, basis in zip(codec.frames, bases, strict=True):
            if (frame.dim > codec.width) != (basis is not None):
                raise ValueError(f"{path}: {frame.site.name}.basis is missing or not expected. Fit it again.")
        return codec


def round_trip(codec: AdapterCodec, adapter: Adapter) -> Adapter:
    """decode(encode(adapter)): what the codec's width leaves of an adapter."""
    return codec.decode(codec.encode(adapter))


def _require_choices(spec: AdapterSpec, width: int | None, basis_dtype: str) -> None:
    if width is not None and width < 1:
        raise ValueError(f"width is {width}; expected a positive number, or None for an exact inverse.")
    if basis_dtype not in BASIS_DTYPES:
        raise ValueError(f"basis_dtype is {basis_dtype!r}; known are {', '.join(BASIS_DTYPES)}.")
    for site in spec.sites:
        if not site.scaling > 0:
            raise ValueError(
                f"site {site.name}: scaling is {site.scaling}, so its ΔW is zero. Set lora_alpha > 0."
            )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a codec file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies lie as a fitted codec's tensors do: products of a factor that begins elsewhere in memory
            # have another last digit on some processors, and are slower.
            table = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a readable safetensors file ({error}). Fit the codec again."
        ) from error
    if HEADER not in metadata:
        raise ValueError(
            f"{path}: not a codec (its header has no {HEADER!r}); expected AdapterCodec.save's file."
        )
    header = json.loads(metadata[HEADER])
    if header["format_version"] not in (FORMAT_VERSION, ORIGIN_VERSION, PACKED_VERSION):
        raise ValueError(
            f"{path}: codec format version {header['format_version']}, but this ltdi_peft reads versions "
            f"{FORMAT_VERSION} to {PACKED_VERSION}. Install the version that wrote it, or fit again."
        )
    try:
        return header, unpacked(table)
    except KeyError as error:
        raise ValueError(f"{path}: tensor {error} is missing. Fit the codec again.") from error
