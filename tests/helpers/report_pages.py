"""Rows of results for the tests of the report, and a reader of the pages that it writes."""

from __future__ import annotations

import html.parser

from disam_peft.common.records import ResultRow


def rows(method, held_out, seed, value, *, adapter="lora", backbone="ViT-B-32", weights="raw"):
    common = (backbone, "none" if method == "zero_shot" else adapter, method, held_out, seed)
    return [
        ResultRow(*common, "held_out", held_out, "top1", value, 40, weights),
        ResultRow(*common, "held_out", "mean", "top1", value, 1, weights, "mean"),
        ResultRow(*common, "source_validation", "photo", "top1", 0.99, 40, weights),
        ResultRow(*common, "held_out", held_out, "nll", 1.0 - value, 40, weights),
    ]


class Reader(html.parser.HTMLParser):
    """Collects the text of table cells and whatever would be fetched."""

    def __init__(self):
        super().__init__()
        self.cells, self.fetched, self.tags, self._in_cell = [], [], set(), False

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.cells.append("")
        self.fetched += [
            v for k, v in attributes if k in ("src", "href", "xlink:href") and not v.startswith(("data:", "#"))
        ]

    def handle_endtag(self, tag):
        self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.cells[-1] += data
