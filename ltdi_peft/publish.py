"""One door to the Hub for all that this package makes.

In: an adapter (a model's, a `GeneratedAdapter`, a folder), a generator or a store.  Out: one commit there.
Idea: what is pushed is written to a folder of its own first, with a page that fits the repository: snapshots
as links, of a run's `about` nothing that tells of this machine. The user's folders are only read.
"""

import math
import tempfile
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import no_type_check

from peft import PeftModel

from ltdi_peft.adapter import CONFIG_FILE as ADAPTER_FILE
from ltdi_peft.adapter import load_adapter_folder, read_adapter, save_adapter_folder, spec_of
from ltdi_peft.cards import CARD_FILE, Nearest, Place, adapter_card, own_card, store_card, write_card
from ltdi_peft.distance import pairwise_delta_w_distances
from ltdi_peft.files import json_bytes, replace_file
from ltdi_peft.generated import GeneratedAdapter
from ltdi_peft.generator import CODEC_FILE, Generator, load_generator
from ltdi_peft.hub import Pushed as Pushed
from ltdi_peft.hub import full_id, is_folder, require_hub_base, upload
from ltdi_peft.memorisation import in_parts
from ltdi_peft.provenance import Provenance, provenance_of, read_provenance, weights_digest, write_provenance
from ltdi_peft.refine import chosen_adapter
from ltdi_peft.spec import Adapter, AdapterSpec, require_same_spec, site_norms
from ltdi_peft.store import Trajectory, TrajectoryStore
from ltdi_peft.trajectory import read_manifest

STORE_FILE = "store.json"


@dataclass(frozen=True)
class Known:
    """An adapter and what is known about where it came from."""

    spec: AdapterSpec
    adapter: Adapter
    provenance: Provenance | None


def push(
    what: PeftModel | GeneratedAdapter | Generator | TrajectoryStore | str | Path,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    overwrite: bool = False,
    message: str = "Push with ltdi_peft",
    base_model: str | None = None,
    license: str | None = None,
    store: TrajectoryStore | str | Path | None = None,
) -> Pushed:
    """Push an adapter, a generator or a trajectory store, with its page, in a private repository by default.

    `what`: a `PeftModel` (its active adapter), a `GeneratedAdapter`, a `Generator`, a `TrajectoryStore`, or a
    folder of one of them. `repo_id`: owner/name, or a name of yours. `revision`: a branch, created where it
    is missing. `overwrite`: replace what the branch holds. `base_model`: the Hub id to name, for a base model
    that was loaded from a folder. `license`: a Hub licence id for the page. `store`: the runs that the
    generator was trained on, for an adapter's distance to the nearest of them.

    Stores go to a dataset repository, without unfinished runs. Raises FileExistsError for a branch that holds
    files unless `overwrite`; FileNotFoundError for a folder of none of these; ValueError for a base model
    without a Hub id, for a public repository unless private=False; PermissionError, ConnectionError, OSError.
    """
    thing, page = opened(what), own_page(what)
    place = Place(full_id(repo_id, token), revision, license)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if isinstance(thing, Generator):
            write_generator(thing, folder, place, base_model)
        elif isinstance(thing, TrajectoryStore):
            write_store(thing, folder, place, base_model)
        else:
            nearest = nearest_run(thing, store) if store is not None else None
            spec = replace(thing.spec, base_model=base_model or thing.spec.base_model)
            require_hub_base(spec.base_model)
            write_adapter(replace(thing, spec=spec), folder, place, nearest)
        if page is not None:
            replace_file(folder / CARD_FILE, page.encode())
        kind = "dataset" if isinstance(thing, TrajectoryStore) else "model"
        options = {"private": private, "revision": revision, "token": token, "overwrite": overwrite}
        return upload(folder, place.name, repo_type=kind, **options, message=message)


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """The model's active adapter as a PEFT folder with its page; the same adapter gives the same bytes."""
    write_adapter(adapter_of(model), Path(folder), Place(), None)


# ---- what is pushed


@no_type_check  # what is passed is checked here, and refused by name
def as_folder(what: str | Path) -> Path:
    """The folder; ValueError for what is no path, FileNotFoundError where there is none."""
    if not isinstance(what, str | Path):
        raise ValueError(
            f"a {type(what).__name__} cannot be pushed; expected a PeftModel, a GeneratedAdapter, a "
            f"Generator, a TrajectoryStore or a folder of one."
        )
    if not Path(what).is_dir():
        raise FileNotFoundError(f"{what} cannot be pushed: there is no such folder.")
    return Path(what)


@no_type_check
def opened(
    what: PeftModel | GeneratedAdapter | Generator | TrajectoryStore | str | Path,
) -> Known | Generator | TrajectoryStore:
    """A folder by what lies in it; FileNotFoundError where there is nothing that can be pushed.

    ValueError for anything else.
    """
    if isinstance(what, Generator | TrajectoryStore):
        return what
    if isinstance(what, PeftModel):
        return adapter_of(what)
    if isinstance(what, GeneratedAdapter):
        return Known(what.spec, what.adapter, what.provenance)
    folder = as_folder(what)
    if (folder / ADAPTER_FILE).is_file():
        return Known(*load_adapter_folder(folder), read_provenance(folder))
    if (folder / CODEC_FILE).is_file():
        return load_generator(folder)
    if (folder / STORE_FILE).is_file():
        return TrajectoryStore(folder, create=False)
    raise FileNotFoundError(
        f"{folder} cannot be pushed: it has no {ADAPTER_FILE} (an adapter), {CODEC_FILE} (a generator) or "
        f"{STORE_FILE} (a store)."
    )


def adapter_of(model: PeftModel) -> Known:
    """The only active adapter of a model; ValueError for several."""
    name = chosen_adapter(model, None)
    return Known(spec_of(model, name), read_adapter(model, name), provenance_of(model, name))


def own_page(what: object) -> str | None:
    """The page that the user wrote, of a folder or a store."""
    folder = what.path if isinstance(what, TrajectoryStore) else what
    return own_card(Path(folder)) if isinstance(folder, str | Path) else None


def nearest_run(known: Known, store: TrajectoryStore | str | Path) -> Nearest:
    """The finished run whose last adapter is the nearest. ValueError: empty store, another adapter."""
    store = store if isinstance(store, TrajectoryStore) else TrajectoryStore(store, create=False)
    found = Nearest("", math.inf)
    for runs, adapters in in_parts(finished_runs(store)):
        name = runs[0].spec.base_model
        spec = replace(known.spec, base_model=name) if is_folder(name) else known.spec
        require_same_spec(spec, runs[0].spec, str(runs[0].path))
        distances = pairwise_delta_w_distances(known.spec, [known.adapter], adapters)[0].tolist()
        for run, adapter, distance in zip(runs, adapters, distances, strict=True):
            norm = math.hypot(*site_norms(known.spec, adapter).values())
            found = min(found, Nearest(run.task.name, distance / norm), key=lambda one: one.distance)
    return found


def finished_runs(store: TrajectoryStore) -> list[Trajectory]:
    """ValueError when there is none."""
    if not (runs := store.trajectories()):
        raise ValueError(f"{store.path} holds no finished run.")
    return runs


# ---- folders as they will lie on the Hub


def write_adapter(known: Known, folder: Path, place: Place, nearest: Nearest | None) -> None:
    """Weights, configuration, provenance and page."""
    save_adapter_folder(folder, known.spec, known.adapter)
    changed = False
    if known.provenance is not None:
        write_provenance(folder, known.provenance)
        changed = weights_digest(known.adapter) != known.provenance.weights
    write_card(folder, adapter_card(known.spec, known.provenance, place, changed=changed, nearest=nearest))


def write_generator(generator: Generator, folder: Path, place: Place, base_model: str | None) -> None:
    """The generator's folder, for a base model by this name."""
    if base_model is not None:
        generator = copy(generator)  # its weights are shared
        generator.config = replace(generator.config, base_model=base_model)
        spec = replace(generator.spec, base_model=base_model)
        generator.codec = replace(generator.codec, spec=spec)
    require_hub_base(generator.config.base_model)
    generator.save_pretrained(folder, model_card_kwargs={"place": place})


def write_store(store: TrajectoryStore, folder: Path, place: Place, base_model: str | None) -> None:
    """The store's finished runs, their snapshots as links."""
    runs = finished_runs(store)
    (folder / "starts").mkdir()
    (folder / STORE_FILE).write_bytes((store.path / STORE_FILE).read_bytes())
    for run in runs:
        target = folder / "runs" / run.run_id
        target.mkdir(parents=True)
        manifest = read_manifest(run.path)
        manifest["about"] = {
            key: value for key, value in run.about.items() if not tells_of_machine(key, value)
        }
        manifest["spec"]["base_model"] = base_model or run.spec.base_model
        require_hub_base(manifest["spec"]["base_model"])
        replace_file(target / "run.json", json_bytes(manifest))
        for snapshot in run.snapshots:
            (target / snapshot.path.name).symlink_to(snapshot.path.resolve())
        start = folder / "starts" / run.start_path.name
        if not start.exists():
            start.symlink_to(run.start_path.resolve())
    write_card(folder, store_card(TrajectoryStore(folder).trajectories(), place))


def tells_of_machine(key: str, value: object) -> bool:
    """Whether an entry of a run's `about` names a machine or a place on it."""
    return key == "host" or (isinstance(value, str) and Path(value).is_absolute())
