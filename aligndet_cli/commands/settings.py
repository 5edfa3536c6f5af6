"""Commands that list choices and settings, and measure this machine."""

import json
from pathlib import Path

import typer

from aligndet_cli import flags
from aligndet_cli.commands.terminal import console, print_json, user_errors, with_data_root
from aligndet_cli.config import STAGES, Sources, assign, flatten, load_config
from aligndet_cli.errors import ConfigError, did_you_mean
from aligndet_cli.flags import Given, own, setting, with_flags
from aligndet_cli.stage import find_stage

BENCH = (
    flags.DETECTOR,
    flags.BACKBONE,
    setting("--stage", "stage"),
    setting("--batch-size", "batch_size"),
    setting("--short-side", "short_side"),
    setting("--long-side", "long_side"),
    setting("--proposals", "num_proposals"),
    setting("--steps", "steps"),
    *flags.DATA,
    flags.SET,
    flags.JSON,
    flags.SEED,
    flags.ACCELERATOR,
    flags.WORKERS,
    *flags.SPEED,
)


@with_flags(BENCH, "bench", ("DATA", f"{flags.LAYOUTS}, or a folder of images (drawn ones)."))
def bench(data: Path | None, given: Given) -> None:
    """Measure how fast this machine trains a detector, and how long the paper's schedule would take on it."""
    from aligndet_cli.tools.bench.measure import bench_table, run_bench
    from aligndet_cli.tools.bench.plan import BenchConfig

    is_json = given.control.json
    with user_errors(given):
        sources = Sources(None, given.control.set, with_data_root(data, given))
        config, _ = load_config(BenchConfig, "bench", sources)
        timings = run_bench(config, given.flags)
        if is_json:
            stages = {timing.stage: vars(timing) for timing in timings}
            print_json({"command": "bench", "settings": config.to_json(), "stages": stages})
        else:
            console().print(bench_table(timings))


def list_detectors() -> None:
    """List the detector families."""
    from aligndet_cli.detectors import DETECTORS

    typer.echo("\n".join(sorted(DETECTORS)))


def list_backbones() -> None:
    """List the backbones, and the weights by name that there are for them."""
    from aligndet_cli.backbones import COMPOSITES, FAMILIES, torchvision_weights

    names = (*FAMILIES, *COMPOSITES)
    width = max(map(len, names))
    for name in names:
        typer.echo(f"{name:<{width}} {', '.join(torchvision_weights(name)) or 'none, give a file'}")
    typer.echo(
        f"{'timm:NAME':<{width}} timm; one of timm with four stages, or a plain ViT; needs pip install 'aligndet[timm]'"
    )


SHOW = (
    own("--origin", bool, "Say where each value comes from (off)."),
    flags.CONFIG,
    flags.SET,
    flags.JSON,
)


@with_flags(SHOW, "config show", ("STAGE", f"{' | '.join(STAGES)}."), str, words=STAGES)
def config_show(stage: str | None, given: Given, *, origin: bool = False) -> None:
    """Print all settings of a stage, with what its recipe fills in, as TOML, ready for --config."""
    is_json = given.control.json
    with user_errors(given):
        if stage is None:
            raise ConfigError(f"which stage? name it: `aligndet config show STAGE`; there are: {', '.join(STAGES)}")
        if stage not in STAGES:
            raise ConfigError(f"'{stage}' is not a stage{did_you_mean(stage, list(STAGES))}")
        sources = Sources(given.control.config, given.control.set)
        resolved, origins = load_config(find_stage(stage).steps().config, stage, sources)
        values, from_recipe = resolved.to_json(), resolved.from_recipe()
        # Settings that no artifact records, such as `export_file`.
        values |= {
            name: str(value) if (value := getattr(resolved, name)) else None
            for name, field in type(resolved).model_fields.items()
            if field.exclude
        }
        for key, value in from_recipe.items():
            assign(values, key, value)
            origins.setdefault(key, "recipe")
        if is_json:
            print_json({"command": "config show", "stage": stage, "config": values, "origins": origins})
            return
        typer.echo(f"[{stage}]")
        for key, value in flatten(values):
            end = f"  # {origins.get(key, 'default')}" if origin else ""
            # TOML has no null: a setting that is not set is shown as a comment.
            line = f"# {key} is not set" if value is None else f"{key} = {json.dumps(value)}"
            typer.echo(line + end)
