"""Train a generator on collected trajectories, in one process or many.

accelerate launch recipes/train_generator.py recipes/NAME.yaml [--section.field=value …]
"""

import sys

from accelerate import PartialState

from ltdi_peft.base import keep_freed_memory
from ltdi_peft.launch import asked_processes, start_all, use_all_cores
from ltdi_peft.quiet import drop_kernel_notice


def main(arguments: list[str]) -> int:
    """Exit status 0, or 2 with one line that says what is wrong, written by the main process."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if (count := asked_processes()) > 1:
        print(f"accelerate launch --cpu started one of {count} processes; starting all of them by torchrun")
        return start_all(count, [__file__, *arguments])
    use_all_cores()
    drop_kernel_notice()
    from ltdi_peft.train import train_generator

    keep_freed_memory()
    try:
        generator = train_generator(arguments[0], arguments[1:])
    except (ValueError, OSError) as error:
        if PartialState().is_main_process:
            print(f"train_generator: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    tasks, scale = len(generator.config.training_tasks), generator.config.guidance_scale
    if PartialState().is_main_process:
        print(f"trained on {tasks} tasks; guidance scale {scale}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
