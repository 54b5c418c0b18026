"""Many adapters on one frozen base model in one forward pass.

In: rows (token ids, where the answer starts) and `Stacked` factors, n adapters at once.
Out: logits at the answer positions, differentiable with respect to the factors.
Idea: the adapters of n tasks share every matrix product of the base model; only the two thin products A, B
are per adapter (one batched product each). Layers below the first adapted one see no adapter: their output
is computed once per row and kept.
Source: LoRA, arXiv:2106.09685 §4.1 (the delta is scaling · B A x).
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ltdi_peft.adapter import Adapter, Site
from ltdi_peft.base import Base, require_causal
from ltdi_peft.chat import chat_ids
from ltdi_peft.task import Example

Stacked = dict[str, tuple[Tensor, Tensor]]  # site → A (adapter, rank, fan_in), B (adapter, fan_out, rank)
# Tokens a batch through the frozen lower layers; larger batches gain nothing on two cores.
LOWER_TOKENS = 4096
# Relative error at which two ways through the model count as one. Where a cut is right, both ways run the
# very same kernels (found 0 in float32 and bfloat16); a doubled position shows as 0.1 and more, Gemma 2's cap
# of small logits as 1e-5.
SAME = 1e-6
PROBE_TOKENS = 16


@dataclass(frozen=True)
class Row:
    """One example as token ids; `ids[answer:]` are the answer and the end token."""

    ids: tuple[int, ...]
    answer: int


def example_text(prompt: str | None, text: str) -> str:
    """What the model reads before it answers; `prompt` None leaves the task prompt out of the context."""
    head = f"{prompt}\n" if prompt else ""
    return f"{head}Input: {text}\nOutput:"


def make_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | None,
    example: Example,
    answer: str | None = None,
    *,
    shots: Sequence[Example] = (),
) -> Row:
    """Token ids of an example; `answer` replaces the example's own (a choice).

    `shots` are examples in context, between prompt and question, each closed by the end token, or the model
    could not know that its own has to be. Question and answer are tokenised apart, as when it generates. An
    example with turns is read by the tokenizer's chat template, if it has one.
    """
    answer = example.answer if answer is None else answer
    if example.turns and tokenizer.chat_template:
        before, after = chat_ids(tokenizer, prompt, example, answer, shots)
        return Row((*before, *after), len(before))
    if not isinstance(end := tokenizer.eos_token_id, int):
        raise ValueError("the tokenizer has no end token, so no answer could end: set tokenizer.eos_token.")

    def ids_of(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before = []
    for shot in shots:
        before += [*ids_of(example_text(prompt, shot.input)), *ids_of(f" {shot.answer}"), end, *ids_of("\n")]
        prompt = None  # it stands once, before the first example
    before += ids_of(example_text(prompt, example.input))
    after = ids_of(f" {answer}")
    return Row((*before, *after, end), len(before))


def stack_adapters(adapters: Sequence[Adapter], device: torch.device | str = "cpu") -> Stacked:
    """n adapters with equal sites → one pair of stacked factors a site."""
    return {
        site: (
            torch.stack([adapter[site][0] for adapter in adapters]).to(device),
            torch.stack([adapter[site][1] for adapter in adapters]).to(device),
        )
        for site in adapters[0]
    }


def unstack_adapter(stacked: Stacked, index: int) -> Adapter:
    """Adapter `index` as float32 copies on the CPU."""
    return {
        site: (
            a[index].detach().to("cpu", torch.float32, copy=True).contiguous(),
            b[index].detach().to("cpu", torch.float32, copy=True).contiguous(),
        )
        for site, (a, b) in stacked.items()
    }


def unstacked(stacked: Stacked) -> Iterator[Adapter]:
    """`unstack_adapter` of each; what lies on an accelerator is fetched once a site."""
    count = next(iter(stacked.values()))[0].shape[0]
    near = {site: (a.detach().cpu(), b.detach().cpu()) for site, (a, b) in stacked.items()}
    return (unstack_adapter(near, index) for index in range(count))


def low_rank(
    x: Float[Tensor, "row length fan_in"],
    a: Float[Tensor, "adapter rank fan_in"],
    b: Float[Tensor, "adapter fan_out rank"],
    scaling: float,
) -> Float[Tensor, "row length fan_out"]:
    """scaling · B A x, rows grouped by adapter: the first row/adapter rows belong to adapter 0, and so on."""
    grouped = x.reshape(a.shape[0], -1, x.shape[-1])
    thin = grouped @ a.to(x.dtype).mT
    return (scaling * (thin @ b.to(x.dtype).mT)).reshape(*x.shape[:-1], b.shape[1])


@contextmanager
def applied(root: nn.Module, sites: Sequence[Site], stacked: Stacked) -> Iterator[None]:
    """Within the block, each site's module adds its adapters' delta. The base weights are not touched."""

    def adding(site: Site):  # noqa: ANN202
        a, b = stacked[site.name]

        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            return out + low_rank(args[0], a, b, site.scaling).to(out.dtype)

        return hook

    handles = [root.get_submodule(site.name).register_forward_hook(adding(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class AdaptedBase:
    """A frozen base model, cut below its first adapted layer where that is possible.

    `cut` is the number of frozen lower layers whose output is kept per row (0: nothing is kept, every row
    runs the whole model). The cut is proved on a probe when it is made, and given up if the halves do not
    give the whole. ValueError for a model that is not causal, or in training mode: dropout would differ.
    """

    def __init__(self, base: Base, sites: Sequence[Site]) -> None:
        require_causal(base.model)
        if base.model.training:
            raise ValueError(
                f"base model {base.name!r} is in training mode; call model.eval() before adapting it."
            )
        self.base = base
        self.sites = tuple(sites)
        self.device = base.model.device
        self.decoder = base.model.get_decoder()
        self.head = output_embedding(base.model)
        self.upper = self.decoder
        self.cut = 0
        # Models that scale or cap their logits after the output embedding run whole, with logits everywhere;
        # an adapted one too: its delta needs equally many rows of every adapter.
        adapted_head = any(base.model.get_submodule(site.name) is self.head for site in sites)
        self.plain_head = not adapted_head and self._head_is_plain()
        first = first_adapted_layer(self.decoder, sites, base.model) if self.plain_head else 0
        if first and not layer_kinds_shift(self.decoder, first):
            first = 0
        if first:
            self._cut_below(first)

    def _probe(self) -> Int[Tensor, "row length"]:
        return torch.arange(2, 2 + PROBE_TOKENS, device=self.device)[None] % self.base.model.config.vocab_size

    @torch.no_grad()
    def _head_is_plain(self) -> bool:
        hidden = self.decoder(input_ids=self._probe(), use_cache=False).last_hidden_state
        return same(self.base.model(input_ids=self._probe(), use_cache=False).logits, self.head(hidden))

    @torch.no_grad()
    def _cut_below(self, first: int) -> None:
        name, layers = decoder_layers(self.decoder)
        self._lower = with_modules(self.decoder, name, nn.ModuleList(layers[: first + 1]))
        self._watched = layers[first]
        self.upper = with_modules(self.decoder, name, nn.ModuleList(layers[first:]))
        self.cut = first
        probe = self._probe()
        whole = self.decoder(input_ids=probe, use_cache=False).last_hidden_state
        halves = self.upper(inputs_embeds=self._lower_output(probe), use_cache=False).last_hidden_state
        # A model that scales or shifts its embeddings (Gemma, GPT-2) would do so twice.
        if not same(whole, halves):
            self.upper, self.cut = self.decoder, 0

    def _lower_output(self, ids: Int[Tensor, "row length"]) -> Float[Tensor, "row length hidden"]:
        seen: list[Tensor] = []

        def watch(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        handle = self._watched.register_forward_pre_hook(watch, with_kwargs=True)
        try:
            self._lower(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
        return seen[0]

    @torch.no_grad()
    def inputs(self, rows: Sequence[Row]) -> list[Tensor]:
        """What the upper part reads, on the CPU: (length, hidden) a row after a cut, else ids (length,)."""
        ids = [torch.tensor(row.ids) for row in rows]
        if self.cut == 0:
            return ids
        order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
        kept: list[Tensor] = [torch.empty(0)] * len(rows)
        for batch in batches_by_tokens(order, [len(row.ids) for row in rows], LOWER_TOKENS):
            padded = pad_sequence([ids[index] for index in batch], batch_first=True).to(self.device)
            hidden = self._lower_output(padded)
            for place, index in enumerate(batch):
                kept[index] = hidden[place, : len(rows[index].ids)].to("cpu", copy=True)
        return kept

    def answer_logits(
        self, rows: Sequence[Row], inputs: Sequence[Tensor], stacked: Stacked
    ) -> tuple[Float[Tensor, "position vocab"], Int[Tensor, " position"], Int[Tensor, " position"]]:
        """Logits that predict the answer tokens (float32 or wider), the tokens, and the row of each.

        Rows are grouped by adapter and every adapter has equally many. Padding is on the right, where a
        causal model's answer positions cannot see it, so no mask is needed.
        """
        adapters = next(iter(stacked.values()))[0].shape[0]
        if len(rows) % adapters:
            raise ValueError(f"{len(rows)} rows cannot be shared evenly by {adapters} adapters")
        batch = pad_sequence(list(inputs), batch_first=True).to(self.device)
        owner, place, target = (index.to(self.device) for index in answer_positions(rows))
        with applied(self.base.model, self.sites, stacked):
            if self.plain_head:
                key = "input_ids" if self.cut == 0 else "inputs_embeds"
                hidden = self.upper(**{key: batch}, use_cache=False).last_hidden_state
                logits = self.head(hidden[owner, place])
            else:
                logits = self.base.model(input_ids=batch, use_cache=False).logits[owner, place]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)), target, owner


def same(one: Tensor, other: Tensor) -> bool:
    """Equal up to a relative error of `SAME` (Frobenius)."""
    one, other = one.float(), other.float()
    return bool((one - other).norm() <= SAME * one.norm())


def answer_positions(
    rows: Sequence[Row],
) -> tuple[Int[Tensor, " position"], Int[Tensor, " position"], Int[Tensor, " position"]]:
    """Row, place whose logits predict the token, and the token, for every answer token of every row."""
    owner = [index for index, row in enumerate(rows) for _ in row.ids[row.answer :]]
    place = [position - 1 for row in rows for position in range(row.answer, len(row.ids))]
    target = [token for row in rows for token in row.ids[row.answer :]]
    return torch.tensor(owner), torch.tensor(place), torch.tensor(target)


def batches_by_tokens(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Consecutive indices of `order`, cut so that a padded batch holds at most `most` tokens, but one row."""
    batch: list[int] = []
    for index in order:
        longest = max([lengths[index], *(lengths[other] for other in batch)])
        if batch and longest * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def decoder_layers(decoder: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder's list of layers, by name: its only ModuleList with one entry a layer."""
    depth = decoder.config.num_hidden_layers  # type: ignore[union-attr]
    found = [(n, m) for n, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(found) != 1:
        kind = type(decoder).__name__
        raise ValueError(f"{kind}: expected one ModuleList of {depth} layers, found {len(found)}.")
    return found[0]


def output_embedding(model: PreTrainedModel) -> nn.Module:
    """What turns hidden states into logits. ValueError for a model without."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embedding; a causal language model has.")
    return head


def layer_kinds_shift(decoder: nn.Module, first: int) -> bool:
    """Whether the upper layers' kinds of attention are those of the lowest layers too.

    transformers 5 takes a layer's mask by its place in the list, so in a model of mixed kinds (sliding and
    full) the upper half would get the lowest layers' masks; a probe shorter than the window cannot show it.
    """
    kinds = decoder.config.to_dict().get("layer_types") or []  # type: ignore[union-attr]
    return kinds[first:] == kinds[: len(kinds) - first]


def first_adapted_layer(decoder: nn.Module, sites: Sequence[Site], model: nn.Module) -> int:
    """Index of the lowest decoder layer that holds a site; 0 when a site lies outside the layers."""
    _, layers = decoder_layers(decoder)
    home = {id(module): index for index, layer in enumerate(layers) for module in layer.modules()}
    return min(home.get(id(model.get_submodule(site.name)), 0) for site in sites)


def with_modules(module: nn.Module, name: str, child: nn.Module) -> nn.Module:
    """A view of `module` that shares every weight but has `child` under `name`."""
    view = copy.copy(module)
    view._modules = {**module._modules, name: child}
    return view
