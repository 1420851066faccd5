"""The page: sections in order, poured into a template.

The template is jinja2's, which escapes every value. It lies beside this file, as does the style sheet that it puts
into the page. Drawings come as markup from :mod:`topt_vllm.report.svg`, which escapes by itself. The page has no
script and loads nothing, and says so to the browser. It holds no time of its own, so the same files
give the same bytes.
"""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from topt_vllm.report.heat_map import thresholds
from topt_vllm.report.identity import facts, quality
from topt_vllm.report.inputs import Inputs
from topt_vllm.report.layer_rows import rows_by_layer
from topt_vllm.report.losses import losses
from topt_vllm.report.needles import needles
from topt_vllm.report.speed import speed
from topt_vllm.report.tasks import tasks
from topt_vllm.version import __version__

_SECTIONS = (quality, thresholds, rows_by_layer, losses, needles, tasks, speed)


def render(inputs: Inputs) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("topt_vllm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        model=inputs.table.model.id,
        facts=facts(inputs.table),
        notes=inputs.notes,
        sections=[section(inputs) for section in _SECTIONS],
        sources=inputs.sources,
        version=__version__,
        # Ours, and not a file's: it may not be escaped.
        style=Markup(style),
    )
