"""HTML documentation pages to plain text: keep what a reader reads, drop what a browser needs."""

import re
from html.parser import HTMLParser


def _words(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SKIP_TAGS = _words(
    "script style nav header footer aside button form select svg math noscript template head "
    "iframe object canvas audio video"
)
_VOID_TAGS = _words("area base br col embed hr img input link meta param source track wbr")
_BLOCK_TAGS = _words(
    "address article blockquote body center dd details div dl dt fieldset figcaption figure h1 h2 "
    "h3 h4 h5 h6 hr li main ol p pre section summary table tbody tfoot thead tr ul"
)
# HTML lets these stay open, so a skip that waits for their end tag might never end.
_END_TAG_OPTIONAL = _words("li p dt dd tr td th option body html")
_PARAGRAPH_TAGS = _words("h1 h2 h3 h4 h5 h6 p pre table ul ol dl blockquote")
# Class, id and role values by which Sphinx, DocBook, rustdoc, mdBook, EDoc, Javadoc, Doxygen,
# Haddock and hand-written sites mark navigation, permalinks, line numbers and page furniture.
_FURNITURE = _words(
    "anchor announcement back-to-top breadcrumb breadcrumbs breadcrumblist clipboard contents "
    "copyright copybutton doc-anchor docutils-footer documentation_options footer "
    "column2 fancy_toc mark tooltip gototop headerlink header-link hidden-header line-numbers "
    "linenos lineno localtoc menu menubar path "
    "mobile-nav-toggler nav nav-chapters nav-wrapper navbar navfooter navheader navigation "
    "navlinks notices out-of-band page_actions permalink prevnext prev-next-area prev-next-bottom "
    "qindex quickview related relations rst-versions rustdoc-toolbar search searchbox sidebar "
    "sidebartitle since skip-link source-link sphinxsidebar srclink stability toc toctree-wrapper "
    "toggle-wrapper toplang top-nav top version viewcode-back viewcode-link src src-link "
    "sphx-glr-footer sphx-glr-download sphx-glr-signature sphx-glr-timing toolbar tocs"
)
_MAIN = re.compile(
    r"""<(?:main\b|article\b|section\s[^>]*id="main-content"|[a-z]+\s[^>]*role="main"
    |div\s[^>]*class="(?:body|document|bd-article|refentry|chapter|sect1)")""",
    re.IGNORECASE | re.VERBOSE,
)
_BODY = re.compile(r"<body\b", re.IGNORECASE)
_SPACES = re.compile(r"[ \t\r\n\f]+")
_NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"
# Break requests: a run of them (and of blanks between) becomes one line break, or one blank line
# when any of them asks for that. Private-use characters cannot collide with a page's text.
_LINE_BREAK, _PARAGRAPH_BREAK = "\ue000", "\ue001"
_BREAKS = re.compile(
    f"[ \n]*[{_LINE_BREAK}{_PARAGRAPH_BREAK}][ \n{_LINE_BREAK}{_PARAGRAPH_BREAK}]*"
)
_TYPOGRAPHY = str.maketrans(
    {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "\N{LEFT DOUBLE QUOTATION MARK}": '"',
        "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
        "\N{EN DASH}": "-",
        "\N{EM DASH}": "--",
        "\N{HORIZONTAL ELLIPSIS}": "...",
        "\N{PILCROW SIGN}": None,
        "\N{ZERO WIDTH SPACE}": None,
        "\N{SOFT HYPHEN}": None,
        "\r": None,
    }
)


class _Extractor(HTMLParser):
    """Collects text pieces; block boundaries become newlines, ``pre`` keeps its layout."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.pieces: list[str] = []
        self._skipped_tag = ""
        self._skip_depth = 0
        self._pre_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._skip_depth:
            self._skip_depth += tag == self._skipped_tag
            return
        skippable = tag not in _VOID_TAGS and tag not in _END_TAG_OPTIONAL
        if skippable and (tag in _SKIP_TAGS or _is_furniture(attrs)):
            self._skipped_tag, self._skip_depth = tag, 1
            return
        if tag == "br":
            self.pieces.append(_LINE_BREAK)
        elif tag in _BLOCK_TAGS:
            self._break(tag)
        elif ("class", "classifier") in attrs:
            self.pieces.append(" : ")
        if tag == "pre":
            self._pre_depth += 1
        elif tag == "li":
            self.pieces.append("- ")
        elif tag in ("td", "th"):
            self.pieces.append("  ")

    def handle_endtag(self, tag: str) -> None:
        if self._skip_depth:
            self._skip_depth -= tag == self._skipped_tag
            return
        if tag == "pre":
            self._pre_depth = max(0, self._pre_depth - 1)
        if tag in _BLOCK_TAGS:
            self._break(tag)

    def _break(self, tag: str) -> None:
        self.pieces.append(_PARAGRAPH_BREAK if tag in _PARAGRAPH_TAGS else _LINE_BREAK)

    def handle_data(self, data: str) -> None:
        if self._skip_depth:
            return
        if self._pre_depth:
            # Protects the layout of code from the whitespace folding that follows.
            data = data.expandtabs(8).replace(" ", _NO_BREAK_SPACE)
            self.pieces.append(data)
        else:
            self.pieces.append(_SPACES.sub(" ", data))


def _is_furniture(attrs: list[tuple[str, str | None]]) -> bool:
    for name, value in attrs:
        if (
            value
            and name in ("class", "id", "role")
            and not _FURNITURE.isdisjoint(value.lower().split())
        ):
            return True
    return False


def html_to_text(html: str) -> str:
    """Convert one documentation page to plain text.

    The page's main part is used when it is marked as such; navigation, scripts, permalinks and
    line numbers are dropped. Prose paragraphs become one line each, separated by blank lines;
    preformatted blocks keep their lines and indentation.

    Args:
        html: The page's markup.

    Returns:
        The text, without leading or trailing blank lines; empty when nothing readable is left.
    """
    start = _MAIN.search(html) or _BODY.search(html)
    extractor = _Extractor()
    extractor.feed(html[start.start() :] if start else html)
    extractor.close()
    text = "".join(extractor.pieces).translate(_TYPOGRAPHY)
    text = _BREAKS.sub(lambda run: "\n\n" if _PARAGRAPH_BREAK in run[0] else "\n", text)
    text = re.sub(r" {3,}", "  ", text)
    text = re.sub(r" *\n *", "\n", text)
    text = re.sub(r"^-\n+(?=[^\n-])", "- ", text, flags=re.MULTILINE)
    text = text.replace(_NO_BREAK_SPACE, " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
