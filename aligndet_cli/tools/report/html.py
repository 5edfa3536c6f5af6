"""`aligndet report --html`: write a workspace as one page that needs no other file."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from aligndet_cli import __version__
from aligndet_cli.errors import ConfigError
from aligndet_cli.files import check_output_file, write_bytes
from aligndet_cli.logs import logger
from aligndet_cli.tools.report import pictures
from aligndet_cli.tools.report.collect import Report
from aligndet_cli.tools.report.page import collect_page
from aligndet_cli.workspace import Workspace

OPEN_RUNS = 8  # more of them are folded


def write_page(workspace: Workspace, report: Report, file: Path | None = None) -> Path:
    """Write the page of a workspace, which loads nothing from elsewhere and may be sent around; return the file.

    Args:
        file: None: `report.html` in the workspace.

    Raises:
        ConfigError: the workspace is empty, or the file cannot be written.
    """
    if file is not None:
        check_output_file(file)
    page = collect_page(workspace, report)
    if not page.artifacts.rows:
        raise ConfigError(f"{workspace.root}: empty; start with `aligndet proposals DATA`")
    file = file or workspace.root / "report.html"
    # Everything that comes from files is escaped.
    loader, undefined = PackageLoader("aligndet_cli.tools.report"), StrictUndefined
    environment = Environment(loader=loader, undefined=undefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("page.html").render(page=page, open_runs=OPEN_RUNS, version=__version__)
    write_bytes(file, text.encode())
    if page.left_out:
        logger.warning(
            "%s: %d pictures did not fit into %d MB, and are named instead: look at them in %s, or give each study a "
            "workspace of its own (-w)",
            *(file, len(page.left_out), pictures.BUDGET // 1_000_000, workspace.root),
        )
    return file
