"""T2L's network: an MLP that writes every site's factors from the task's condition and the site's place.

In: conditions (prompt, condition).  Out: differences from the shared start, of all sites of one kind together
(prompt, site, number), and with them the stacked factors {site: (A, B)}.
Idea: one trunk serves all sites and learns what they have in common; what a site is, it reads from learned
embeddings of the layer index and of the module. Heads start at zero: an untrained network names the start.
Source: Text-to-LoRA, arXiv:2506.06105, from its description; our own code.
"""

import math
import re

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ltdi_peft.spec import Adapter, AdapterSpec, Site, check_adapter

EMBEDDING = 32  # numbers that stand for a layer, and for a module
WIDER = 4  # width of a block's inside over the trunk's
LEAST_UNIT = 1e-8  # of a factor that no training run moved: it stays where it is
INDEX = re.compile(r"\.(\d+)\.")

Differences = dict[str, Float[Tensor, "prompt site number"]]
"""Kind → what is added to the start, per site of that kind: A's numbers where A is trained, then B's."""

MeanDifference = dict[str, Float[Tensor, "1 site number"]]


def kind_and_layer(name: str) -> tuple[str, int]:
    """ "model.layers.7.self_attn.q_proj" → ("model.layers.*.self_attn.q_proj", 7); layer −1 without index."""
    found = INDEX.search(name)
    if found is None:
        return name, -1
    return f"{name[: found.start()]}.*.{name[found.end() :]}", int(found[1])


def site_kinds(spec: AdapterSpec) -> dict[str, tuple[Site, ...]]:
    """Kind → its sites in token order. ValueError where sites of one kind differ in shape."""
    kinds: dict[str, tuple[Site, ...]] = {}
    for site in spec.sites:
        kind, _ = kind_and_layer(site.name)
        kinds[kind] = (*kinds.get(kind, ()), site)
    for kind, sites in kinds.items():
        shapes = {(site.rank, site.fan_in, site.fan_out) for site in sites}
        if len(shapes) > 1:
            raise ValueError(
                f"sites {kind} have different (rank, fan_in, fan_out): {sorted(shapes)}. T2L has one output "
                f"head a module, so their shapes must be equal: adapt other modules, or do without T2L."
            )
    return kinds


class Block(nn.Module):
    """Layer norm and an MLP, added to what came in."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.inside = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, WIDER * hidden),
            nn.SiLU(),
            nn.Linear(WIDER * hidden, hidden),
        )

    def forward(self, h: Float[Tensor, "prompt site hidden"]) -> Float[Tensor, "prompt site hidden"]:
        """One residual block; sites do not see each other."""
        return h + self.inside(h)


class Hypernetwork(nn.Module):
    """Condition → differences of all sites. `train_a` False (gauge `shared_a`): A is always the start's.

    Raises BrokenAdapterError for a start that does not fit `spec`, ValueError for sites of one kind with
    different shapes.
    """

    scale: Tensor  # (site, 2): the unit of A's and of B's differences, in token order; 1 until `set_units`

    def __init__(
        self,
        spec: AdapterSpec,
        start: Adapter,
        *,
        condition_width: int,
        hidden: int = 256,
        layers: int = 3,
        train_a: bool = False,
    ) -> None:
        super().__init__()
        check_adapter(spec, start, "the shared start")
        self.start, self.train_a = start, train_a
        self.order = tuple(site.name for site in spec.sites)
        self.kinds = site_kinds(spec)
        self.rows = {kind: [self.order.index(site.name) for site in own] for kind, own in self.kinds.items()}
        places = [kind_and_layer(name) for name in self.order]
        depths, names = sorted({layer for _, layer in places}), list(self.kinds)
        indices = [[depths.index(layer), names.index(kind)] for kind, layer in places]
        self.register_buffer("place", torch.tensor(indices), persistent=False)
        self.register_buffer("scale", torch.ones(len(self.order), 2))
        self.condition = nn.Linear(condition_width, hidden)
        self.layer = nn.Embedding(len(depths), EMBEDDING)
        self.module = nn.Embedding(len(names), EMBEDDING)
        self.inward = nn.Linear(hidden + 2 * EMBEDDING, hidden)
        self.blocks = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.heads = nn.ModuleList(nn.Linear(hidden, sum(self.sizes(kind))) for kind in self.kinds)
        for head in self.heads.parameters():
            nn.init.zeros_(head)

    def sizes(self, kind: str) -> tuple[int, int]:
        """Numbers of a site of this kind that belong to A (0 where A is not trained) and to B."""
        site = self.kinds[kind][0]
        return (site.rank * site.fan_in if self.train_a else 0), site.fan_out * site.rank

    def trunk(self, conditions: Float[Tensor, "prompt condition"]) -> Float[Tensor, "prompt site hidden"]:
        """What the heads read."""
        # Conditions are unit vectors: at this size their numbers are as large as the embeddings'.
        about = self.condition(conditions * math.sqrt(conditions.shape[1]))
        layer, module = self.get_buffer("place").unbind(1)
        place = torch.cat([self.layer(layer), self.module(module)], 1)
        parts = about[:, None].expand(-1, len(place), -1), place.expand(len(about), -1, -1)
        h = self.inward(torch.cat(parts, 2))
        for block in self.blocks:
            h = block(h)
        return self.norm(h)

    def forward(self, conditions: Float[Tensor, "prompt condition"]) -> Differences:
        """Differences from the start, one row a prompt; exactly zero until a head has moved."""
        h = self.trunk(conditions)
        # An Adam step moves every weight alike, so a head would jump by ∝ hidden without the root.
        h = h / math.sqrt(h.shape[2])
        heads = zip(self.kinds, self.heads, strict=True)
        return {kind: head(h[:, self.rows[kind]]) * self.units(kind) for kind, head in heads}

    # ---- differences ⇄ adapters

    def factors(
        self, differences: Differences
    ) -> dict[str, tuple[Float[Tensor, "prompt rank fan_in"], Float[Tensor, "prompt fan_out rank"]]]:
        """The start plus differences, stacked over prompts; differentiable. A frozen A is a view."""
        made = {}
        for kind, sites in self.kinds.items():
            for site, difference in zip(sites, differences[kind].unbind(1), strict=True):
                a, b = (factor.to(difference) for factor in self.start[site.name])
                of_a, of_b = difference.split(self.sizes(kind), dim=1)
                moved = a + of_a.view(-1, *a.shape) if self.train_a else a.expand(len(of_a), -1, -1)
                made[site.name] = moved, b + of_b.view(-1, *b.shape)
        return {name: made[name] for name in self.order}

    def differences(self, adapter: Adapter) -> Differences:
        """The inverse of `factors` for one adapter, as one row; of A only where it is trained."""
        found = {}
        for kind, sites in self.kinds.items():
            rows = []
            for site in sites:
                pairs = zip(adapter[site.name], self.start[site.name], strict=True)
                of_a, of_b = ((factor - start).flatten() for factor, start in pairs)
                rows.append(torch.cat([of_a, of_b]) if self.train_a else of_b)
            found[kind] = torch.stack(rows)[None]
        return found

    def units(self, kind: str) -> Float[Tensor, "site number"]:
        """The size of a 1 that the head writes."""
        own = self.scale[self.rows[kind]]
        of_a, of_b = self.sizes(kind)
        return torch.cat([own[:, :1].expand(-1, of_a), own[:, 1:].expand(-1, of_b)], 1)

    @torch.no_grad()
    def set_units(self, differences: Differences) -> None:
        """Make the root mean square of these, per site and factor, the unit."""
        for kind, one in differences.items():
            for place, part in enumerate(one.split(self.sizes(kind), dim=2)):
                if part.shape[2]:
                    size = part.square().mean((0, 2)).sqrt().clamp_min(LEAST_UNIT)
                    self.scale[self.rows[kind], place] = size.to(self.scale)


def guided(differences: Differences, mean: MeanDifference, *, scale: float, mean_share: float) -> Differences:
    """mean_share · mean + scale · (difference − mean)."""
    return {k: mean_share * mean[k] + scale * (one - mean[k]) for k, one in differences.items()}


@torch.no_grad()
def mean_difference(
    network: Hypernetwork, conditions: Float[Tensor, "task prompt condition"]
) -> MeanDifference:
    """Mean over the tasks and their paraphrases of what the network adds."""
    total: MeanDifference = {}
    for own in conditions:
        for kind, one in network(own.to(network.scale)).items():
            part = one.mean(0, keepdim=True) / len(conditions)
            total[kind] = total[kind] + part if kind in total else part
    return total


def parameter_count(network: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
