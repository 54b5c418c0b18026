"""The trained artefact: prompts in, adapters out.

In: task prompts.  Out: `GeneratedAdapter`s (spec and weights; no base model is needed to make them).
Idea: adapter = decode( centre(condition) + spread · chain(noise, condition) ). A denoiser that learned
nothing leaves the centre; a centre without information leaves the mean training adapter.
One folder: config.json, model.safetensors, codec.safetensors, README.md, encoder.safetensors where the
encoder was tuned, and evaluation.json once it was evaluated; nothing in it is a pickle.
"""

import copy
import json
import tempfile
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ltdi_peft.adapter import Adapter, AdapterSpec
from ltdi_peft.attributes import FILE as ATTRIBUTES_FILE
from ltdi_peft.attributes import AttributeClassifier, load_classifier, save_classifier
from ltdi_peft.base import Base
from ltdi_peft.batched import Stacked, unstacked
from ltdi_peft.cards import Place
from ltdi_peft.centre import Ridge
from ltdi_peft.condition import PromptEncoder
from ltdi_peft.denoiser import Denoiser, DenoiserConfig
from ltdi_peft.diffusion import STEPS, Predict, chain_for, guided, path
from ltdi_peft.encode import AdapterCodec
from ltdi_peft.files import json_bytes, read_json, replace_file
from ltdi_peft.generated import GeneratedAdapter as GeneratedAdapter
from ltdi_peft.generator_config import GeneratorConfig as GeneratorConfig
from ltdi_peft.generator_config import card_text
from ltdi_peft.hub import download, full_id, require_hub_base, upload
from ltdi_peft.int8 import packed, unpacked
from ltdi_peft.provenance import Provenance
from ltdi_peft.spec import delta_norms
from ltdi_peft.task import Example
from ltdi_peft.trajectory import flat, paired

WEIGHTS_FILE, CODEC_FILE, CONFIG_FILE = "model.safetensors", "codec.safetensors", "config.json"
ENCODER_FILE = "encoder.safetensors"  # what tuning added to the encoder's weights
EVALUATION_FILE = "evaluation.json"  # what `evaluate` found, as `cards.scores_of` keeps it
BUFFERS = ("centre", "mean", "spread", "conditions")


class Generator(nn.Module, ModelHubMixin):
    """Codec, centre, denoiser and spec, with `from_pretrained`, `save_pretrained` and `push_to_hub`."""

    centre: Tensor  # (condition + 1, site · width): the ridge's weight, or zeros above the mean
    mean: Tensor  # (site, width): the mean training adapter
    spread: Tensor  # (): root mean square of what the chain models
    conditions: Tensor  # (training task, its part of a condition that prompts make), for nearest-task figures

    def __init__(
        self,
        config: GeneratorConfig,
        codec: AdapterCodec,
        *,
        centre: Tensor,
        mean: Tensor,
        spread: Tensor,
        conditions: Tensor,
        encoder: PromptEncoder | None = None,
        tuning: Adapter | None = None,
        attributes: AttributeClassifier | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.codec = codec
        self.tuning = tuning
        self.attributes = attributes
        self.denoiser = Denoiser(DenoiserConfig(**config.denoiser))
        # Of adapters that work without the task prompt in context, where a network was chosen for them.
        self.alone = Denoiser(DenoiserConfig(**config.denoiser)) if config.alone else None
        for name, value in zip(BUFFERS, (centre, mean, spread, conditions), strict=True):
            self.register_buffer(name, value.float().contiguous())
        self.chain = chain_for(config.loss, config.law, config.k, config.steps)
        self._encoder = encoder
        self.name: str | None = None  # folder or Hub id that it was loaded from,
        self.revision: str | None = None  # and the Hub's commit
        self.scores: dict[str, Any] | None = None

    @property
    def spec(self) -> AdapterSpec:
        """What the adapters sit on."""
        return self.codec.spec

    def purposed(self, prompt_in_context: bool) -> "Generator":
        """This generator as it answers for one purpose: network and guidance change, all else is shared.

        prompt_in_context: whether the model will have the task prompt in its context when it is used. A
        generator without a network of its own for models that will not is the same for both.
        """
        if prompt_in_context or self.alone is None or self.config.alone is None:
            return self
        twin = copy.copy(self)
        twin._modules = {**self._modules, "denoiser": self.alone, "alone": None}
        twin.config = replace(self.config, **self.config.alone, alone=None)
        return twin

    def encode_prompts(
        self,
        prompts: Sequence[str],
        base: Base | None = None,
        examples: Sequence[Sequence[Example]] = (),
        inputs: Sequence[Sequence[str]] = (),
    ) -> Float[Tensor, "prompt condition"]:
        """Conditions, on the CPU. The sentence encoder is loaded at the first call; `base` needs a base.

        `examples`, or `inputs` without answers: of each prompt, or none; ValueError for a generator that does
        not read them.
        """
        count = self.config.condition_examples
        if self.config.encoder == "base":
            # Never kept: it would hold the model, and read through the adapters that it gets later.
            encoder = PromptEncoder("base", base=base, examples=count, attributes=self.attributes)
            return encoder(prompts, examples, inputs)
        if self._encoder is None:
            about = {"base": base, "examples": count, "tuning": self.tuning}
            self._encoder = PromptEncoder(self.config.encoder, **about, attributes=self.attributes)
        return self._encoder(prompts, examples, inputs)

    def predicted_centre(
        self, conditions: Float[Tensor, "prompt condition"]
    ) -> Float[Tensor, "prompt site width"]:
        """Tokens before any diffusion."""
        return Ridge(self.centre)(conditions.to(self.centre)).view(-1, *self.mean.shape)

    def tokens(
        self,
        conditions: Float[Tensor, "prompt condition"],
        *,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Float[Tensor, "prompt site width"]:
        """Generated tokens, from the same noise for every prompt. `steps`: fewer steps of the chain, k … T.

        Guidance stretches all that the condition says away from the mean adapter: 1 is the plain prediction,
        0 leaves the mean and what the network adds without a condition. `config.mean_share` below 1 leaves
        out part of what the training runs have in common; the origin of tokens is the shared start.
        """
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        conditions = conditions.to(self.centre)
        if self.denoiser.config.nonlinear or self.config.sampler == "stochastic":
            # A sampler that adds noise would give each row of a batch another: such rows go one by one.
            parts = conditions.split(1 if self.config.sampler == "stochastic" else len(conditions))
            about = {"seed": seed, "guidance_scale": scale, "steps": steps}
            return torch.cat([deque(self.token_path(part, **about), maxlen=1)[0] for part in parts])
        centre, noise = self._begin(conditions, torch.Generator().manual_seed(seed), scale)
        of_affine, of_noise = self.denoiser.chain_shares(STEPS[self.config.sampler], self.chain, steps)
        affine = self.denoiser.affine(conditions)
        if scale != 1:
            affine = torch.lerp(self.denoiser.affine(self.denoiser.null[None]), affine, scale)
        return centre + self.spread * (of_affine * affine + of_noise * noise)

    def token_path(
        self,
        conditions: Float[Tensor, "prompt condition"],
        *,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
    ) -> Iterator[Float[Tensor, "prompt site width"]]:
        """The tokens at every time of the chain, from the noise to what `tokens` returns up to rounding."""
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        conditions = conditions.to(self.centre)
        rng = torch.Generator().manual_seed(seed)
        centre, noise = self._begin(conditions, rng, scale)
        start, step = noise.expand(len(conditions), -1, -1), STEPS[self.config.sampler]
        for x in path(step, self._guided(conditions, scale), start, self.chain, rng, steps):
            yield centre + self.spread * x

    def _begin(
        self, conditions: Float[Tensor, "prompt condition"], rng: torch.Generator, scale: float
    ) -> tuple[Float[Tensor, "prompt site width"], Float[Tensor, "1 site width"]]:
        """Where the chain's differences are counted from, and the noise that it begins at."""
        noise = torch.randn(1, *self.mean.shape, generator=rng).to(self.centre)
        said = self.predicted_centre(conditions) - self.mean
        return self.config.mean_share * self.mean + scale * said, noise

    def _guided(self, conditions: Float[Tensor, "prompt condition"], scale: float) -> Predict:
        conditional = self.denoiser.predictor(conditions)
        if scale == 1:
            return conditional  # nothing of what the network says without a condition
        none = torch.ones(len(conditions), dtype=torch.bool, device=conditions.device)
        return guided(conditional, self.denoiser.predictor(conditions, none), scale)

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        guidance_scale: float | None = None,
        steps: int | None = None,
        base: Base | None = None,
        prompt_in_context: bool = True,
        examples: Sequence[Sequence[Example]] = (),
        inputs: Sequence[Sequence[str]] = (),
    ) -> list[GeneratedAdapter]:
        """One adapter a prompt; the same seed gives the same bytes, in another batch up to rounding.

        `steps`: fewer steps of the chain, k … T; warns (UserWarning) where task loss trained the whole of it.
        `base`: only for a generator whose condition.encoder is `base`.
        `prompt_in_context`: as in `purposed`. `examples`, `inputs`: as in `encode_prompts`. Raises ValueError
        for an empty prompt, or for one text instead of a list.
        """
        if isinstance(prompts, str):
            raise ValueError(f"generate() takes a list of prompts, got one text: [{prompts!r}] is meant.")
        trained = self.config.recipe.get("train", {}).get("task_loss", {}).get("steps", 0)
        if steps is not None and steps < self.chain.T and trained:
            warnings.warn(
                f"this generator was trained by task loss through all {self.chain.T} steps of its chain; in "
                f"{steps} steps most of what it learnt there is missing.",
                stacklevel=3,
            )
        conditions = self.encode_prompts(prompts, base, examples, inputs)
        about = {"seed": seed, "guidance_scale": guidance_scale, "prompt_in_context": prompt_in_context}
        read = {"examples": [len(own) for own in examples], "inputs": [len(own) for own in inputs]}
        return self._made(prompts, conditions, steps=steps, read=read, **about)

    @torch.no_grad()
    def candidates(
        self,
        prompt: str,
        count: int,
        *,
        seed: int = 0,
        guidance_scale: float | None = None,
        base: Base | None = None,
        prompt_in_context: bool = True,
        examples: Sequence[Example] = (),
        inputs: Sequence[str] = (),
    ) -> list[GeneratedAdapter]:
        """`count` adapters that one prompt may ask for; the first is what `generate` makes of it.

        A generator with attributes makes the others of the prompt's most probable readings, each taken at its
        word; any other one makes them of the seeds that follow. Options and errors as in `generate`.
        """
        about = {"guidance_scale": guidance_scale, "prompt_in_context": prompt_in_context}
        shown = {"examples": [examples] if examples else (), "inputs": [inputs] if inputs else ()}
        if self.attributes is None:
            seeds = range(seed, seed + count)
            return [
                one for s in seeds for one in self.generate([prompt], seed=s, base=base, **shown, **about)
            ]
        soft = self.encode_prompts([prompt], base, **shown)
        conditions = torch.cat([soft, self.attributes.readings(soft[0], count - 1)])
        prompts, read = [prompt] * len(conditions), {"inputs": [len(inputs)] * len(conditions)}
        return self._made(prompts, conditions, seed=seed, read=read, **about)

    def _made(
        self,
        prompts: Sequence[str],
        conditions: Float[Tensor, "prompt condition"],
        *,
        seed: int,
        guidance_scale: float | None,
        prompt_in_context: bool,
        steps: int | None = None,
        read: Mapping[str, Sequence[int]],
    ) -> list[GeneratedAdapter]:
        """One adapter a condition. `read`: what was read beside each prompt → how many, or nothing."""
        own = self.purposed(prompt_in_context)
        about = {"seed": seed, "guidance_scale": guidance_scale, "steps": steps}
        tokens = own.tokens(conditions, **about)
        if prompt_in_context and self.alone is not None and self.config.alone_share:
            alone = self.purposed(prompt_in_context=False).tokens(conditions, **about)
            tokens = torch.lerp(tokens, alone, self.config.alone_share)
        similarity, nearest = self.similarities(conditions).max(1)
        out = []
        made = (one for factors in self.codec.decode_batches(tokens) for one in self.clamped(factors))
        for index, (prompt, (adapter, clamped)) in enumerate(zip(prompts, made, strict=True)):
            provenance = Provenance(
                task_prompt=prompt,
                seed=seed,
                guidance_scale=own.config.guidance_scale if guidance_scale is None else guidance_scale,
                prompt_in_context=prompt_in_context,
                **{name: counts[index] for name, counts in read.items() if counts},
                reading=self.attributes.reading(conditions[index]) if self.attributes else {},
                generator=self.name,
                generator_revision=self.revision,
                base_revision=self.config.base_revision,
                training_tasks=len(self.config.training_tasks),
                nearest_task=self.config.training_tasks[int(nearest[index])],
                nearest_similarity=round(float(similarity[index]), 6),
                weights="",  # hashed when somebody asks, which takes longer than making them
                scores=self.scores,
            )
            out.append(GeneratedAdapter(self.spec, adapter, provenance, clamped))
        return out

    def similarities(self, conditions: Float[Tensor, "prompt condition"]) -> Float[Tensor, "prompt task"]:
        """Cosines of the prompts' conditions with those of the training tasks; of examples nothing counts."""
        width = self.conditions.shape[1]
        said = torch.nn.functional.normalize(conditions[:, :width], dim=-1)
        return said.to(self.conditions) @ self.conditions.mT

    def clamp(self, adapter: Adapter) -> tuple[Adapter, tuple[str, ...]]:
        """B scaled so that ‖ΔW‖ of each site lies in the training range; and the sites where it did not.

        A site of norm 0 cannot be scaled: the proof of load refuses it.
        """
        stacked = {site: (a[None], b[None]) for site, (a, b) in adapter.items()}
        ((scaled, sites),) = self.clamped(stacked)
        return {**adapter, **{site: scaled[site] for site in sites}}, sites

    def clamped(self, factors: Stacked) -> list[tuple[Adapter, tuple[str, ...]]]:
        """`clamp` of several adapters, whose norms are taken together."""
        out, scaled = dict(factors), {}
        for site in self.spec.sites:
            a, b = factors[site.name]
            norm = delta_norms(a, b, site.scaling)
            low, high = self.config.norm_range[site.name]
            wanted = norm.clamp(low, high)
            # A norm that was scaled to a bound comes back with float32 rounding.
            off = (norm > 0) & ((wanted - norm).abs() > 1e-5 * torch.maximum(wanted, norm))
            if off.any():
                scale = torch.where(off, wanted / norm, 1.0).to(b.dtype)
                out[site.name] = (a, b * scale[:, None, None])
                scaled[site.name] = off.tolist()
        adapters = list(unstacked(out))
        sites = [tuple(s for s, off in scaled.items() if off[row]) for row in range(len(adapters))]
        return list(zip(adapters, sites, strict=True))

    # ---- the folder

    def _save_pretrained(self, save_directory: Path) -> None:
        folder = Path(save_directory)
        state = self.state_dict().items()
        weights = {key: weight.detach().to("cpu", torch.float32).contiguous() for key, weight in state}
        replace_file(folder / WEIGHTS_FILE, save(packed(weights) if self.config.shrunk else weights))
        self.codec.save(folder / CODEC_FILE)
        if self.tuning is not None:
            replace_file(folder / ENCODER_FILE, save(flat(self.tuning)))
        if self.attributes is not None:
            save_classifier(self.attributes, folder / ATTRIBUTES_FILE)
        if self.scores is not None:
            replace_file(folder / EVALUATION_FILE, json_bytes(self.scores))
        # Last: a folder with a configuration is whole.
        text = json.dumps(asdict(self.config), indent=1, sort_keys=True, ensure_ascii=False)
        replace_file(folder / CONFIG_FILE, f"{text}\n".encode())

    def generate_model_card(self, *, place: Place | None = None) -> ModelCard:  # pyright: ignore[reportIncompatibleMethodOverride]  # the mixin passes on what save_pretrained got
        """README.md, from configuration and scores; `save_pretrained` writes it where there is none yet."""
        return ModelCard(card_text(self.config, self.spec, place, self.scores))

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]  # the mixin's is public and overwrites
        self,
        repo_id: str,
        *,
        private: bool = True,
        branch: str | None = None,
        token: str | None = None,
        overwrite: bool = False,
        commit_message: str = "Push generator",
    ) -> str:
        """One commit with the generator's folder; returns its URL. Errors as in `ltdi_peft.push`."""
        require_hub_base(self.config.base_model)
        repo = full_id(repo_id, token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, model_card_kwargs={"place": Place(repo, branch)})
            options = {"private": private, "revision": branch, "token": token, "overwrite": overwrite}
            return upload(Path(folder), repo, **options, message=commit_message).url

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> "Generator":
        """A generator from its folder or its Hub id. FileNotFoundError when there is neither."""
        if Path(name).is_dir():
            return load_generator(Path(name))
        try:
            folder = download(
                str(name),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no generator {str(name)!r}: no such folder, and not on the Hub or in its cache ({error}). "
                f"Train one with `ltdi train RECIPE`."
            ) from error
        generator = load_generator(folder)
        generator.name, generator.revision = str(name), folder.name
        return generator


def load_generator(folder: Path) -> Generator:
    """Read a generator's folder. FileNotFoundError or ValueError names a missing, damaged or newer file."""
    require_file(folder, CONFIG_FILE)
    config = GeneratorConfig.from_dict(read_json(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    optional = {ENCODER_FILE: config.tuned, ATTRIBUTES_FILE: config.attributes}
    for name in (WEIGHTS_FILE, CODEC_FILE, *(name for name, has in optional.items() if has)):
        require_file(folder, name)
    codec = AdapterCodec.load(folder / CODEC_FILE)
    try:
        weights = unpacked(load_file(folder / WEIGHTS_FILE))
        buffers = {name: weights.pop(name) for name in BUFFERS}
        tuning = paired(load_file(folder / ENCODER_FILE)) if config.tuned else None
        attributes = load_classifier(folder / ATTRIBUTES_FILE) if config.attributes else None
        generator = Generator(config, codec, tuning=tuning, attributes=attributes, **buffers)  # pyright: ignore[reportArgumentType]  # BUFFERS are its names
        generator.load_state_dict({**weights, **buffers})
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(
            f"{folder / WEIGHTS_FILE} is truncated or does not fit {CONFIG_FILE} ({error}). Copy the "
            f"generator again, or train it again."
        ) from error
    generator.name = folder.resolve().name
    generator.scores = read_json(folder / EVALUATION_FILE) if (folder / EVALUATION_FILE).is_file() else None
    return generator.eval()


def require_file(folder: Path, name: str) -> None:
    """FileNotFoundError where a generator's folder lacks this file."""
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder} is no generator: {name} is missing. Train one with `ltdi train RECIPE`."
        )


def nearest_conditions(
    conditions: Float[Tensor, "prompt condition"], training: Float[Tensor, "task said"]
) -> Int[Tensor, " prompt"]:
    """Index of the training task with the largest inner product; of examples nothing counts."""
    return (conditions[:, : training.shape[1]] @ training.mT).argmax(1)
