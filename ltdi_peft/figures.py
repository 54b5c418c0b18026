"""The figures that `ltdi evaluate` and `ltdi inspect --plot` write.

In: a result with its opened protocol, or a store.  Out: PNG files, file name → title.
Idea: matplotlib is an extra, so nothing above this room imports it, and an evaluation goes on without.
"""

import warnings
from pathlib import Path
from typing import Any

from ltdi_peft.condition import PromptEncoder
from ltdi_peft.plot_data import LEAST, AdapterMap, chain_adapters, map_runs, one_a_domain, similarity
from ltdi_peft.protocol import Protocol
from ltdi_peft.store import TrajectoryStore

CHAINS = 3  # unseen tasks whose chains are drawn


def write_figures(result: dict[str, Any], folder: Path, protocol: Protocol | None = None) -> dict[str, str]:
    """Figures of a result, and with its protocol the chains of a few unseen tasks.

    Without matplotlib a warning (UserWarning) says which extra to install, and nothing is written.
    """
    try:
        from ltdi_peft.plot import save_figures
    except ImportError as error:
        warnings.warn(f"no figures were written: {error}", stacklevel=3)
        return {}
    from ltdi_peft.plot_result import result_figures
    from ltdi_peft.plot_store import map_figure

    figures = result_figures(result)
    if protocol and len(protocol.stored) >= LEAST:
        figures["chains"] = map_figure(chains_map(protocol))
    return save_figures(figures, folder)


def write_store_figures(store: Path, folder: Path, encoder: PromptEncoder | None = None) -> dict[str, str]:
    """Figures of a store's finished runs; prompts are compared by `encoder`, by default MiniLM.

    Raises ImportError that says how to install matplotlib, ValueError for a store without a finished run,
    and OSError, when the other figures are written, where the encoder is not to be had.
    """
    from ltdi_peft.plot import save_figures
    from ltdi_peft.plot_store import similarity_figure, store_figures

    runs = TrajectoryStore(store, create=False).trajectories()
    if not runs:
        raise ValueError(f"{store} holds no finished run, so there is nothing to draw.")
    same = [run for run in runs if run.spec == runs[0].spec]
    written = save_figures(store_figures(same), folder)
    if len({run.task.name for run in same}) >= LEAST:
        found = similarity(same, encoder or PromptEncoder("minilm"))
        written |= save_figures({"similarity": similarity_figure(found)}, folder)
    return written


def chains_map(protocol: Protocol) -> AdapterMap:
    """The stored runs, and the chains of `ours` for unseen tasks of different domains."""
    generator, suite = protocol.generators["ours"], protocol.bench.suite
    oracles = one_a_domain(list(protocol.oracles.values()), CHAINS)
    chains = {}
    for run in oracles:
        prompt = suite[run.task.name].held_out_prompts[0]
        conditions = generator.encode_prompts([prompt], protocol.bench.base)
        chains[run.task.name] = chain_adapters(generator, conditions)
    ends, k = tuple(generator.chain.ends.tolist()), protocol.data.tokens.shape[1]
    return map_runs(protocol.stored, k, chains, oracles, ends)
