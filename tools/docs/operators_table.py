"""Write the registry's table into docs/operators.md, between its two marks: `python -m tools.docs.operators_table`."""

import re
from pathlib import Path

from megagrow.cli.checkpoint.operators import markdown

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"


def main() -> None:
    """Replace what stands between the marks."""
    text = PAGE.read_text(encoding="utf-8")
    block = f"<!-- operators:begin -->\n{markdown()}\n<!-- operators:end -->"
    PAGE.write_text(re.sub(r"<!-- operators:begin -->.*<!-- operators:end -->", lambda _: block, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
