"""CPU seconds of the commands that must answer at once. Run: `python tests/benchmarks/startup.py`."""

import resource
import subprocess
import sys

BUDGET_S = 0.5  # what a person does not notice; torch alone takes longer to import
COMMANDS = (["--help"], ["pretrain-box", "--help"], ["finetune", "--detektor", "x"], ["pretrian-box"])
REPEATS = 5


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one call, of all its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "aligndet_cli.cli", *words], capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    """Print the median of each command and exit 1 where one is above the budget."""
    is_slow = False
    for words in COMMANDS:
        seconds = sorted(cpu_seconds(words) for _ in range(REPEATS))[REPEATS // 2]
        is_slow |= seconds > BUDGET_S
        print(f"aligndet {' '.join(words):<28} {seconds:.2f} s of {BUDGET_S} s")
    sys.exit(is_slow)


if __name__ == "__main__":
    main()
