"""A page of HTML taken apart, with a check that it needs nothing besides itself."""

import html.parser


class Page(html.parser.HTMLParser):
    """Tags with their attributes, all text, and a check that every element is closed in order."""

    VOID = frozenset({'meta', 'link', 'img'})

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def check_self_contained(text):
    page = Page(text)
    assert 'http://' not in text
    assert 'https://' not in text
    assert '//' not in ''.join(text.split('base64,')[0])
    for tag, attrs in page.tags:
        for name in ('src', 'href', 'xlink:href', 'srcset', 'action'):
            assert attrs.get(name, '#').startswith(('data:', '#')), (tag, attrs)
        assert not any(name.startswith('on') for name in attrs)
    assert not page.named('script')
    assert page.named('html') == [{'lang': 'en'}]
    assert len(page.named('title')) == len(page.named('h1')) == 1
    for image in page.named('img'):
        assert image['src'].startswith('data:image/png;base64,')
        assert image['alt']
    for plot in page.named('svg'):
        assert (plot['role'], bool(plot['aria-label'])) == ('img', True)
    return page
