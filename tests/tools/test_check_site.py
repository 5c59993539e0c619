"""The check of a built site finds what is broken, and nothing else."""

from tools.check_site import check


def test_links_places_and_pictures(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "index.html").write_text('<h1 id="top">x</h1><a href="../a.html#x">a</a>')
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="sub/">whole</a><a href="sub/#top">place</a><a href="#y">none</a>'
        '<a href="sub/index.html#low">none</a><a href="gone.html">none</a><img src="gone.png">'
        '<script src="https://cdn.example/x.js"></script><a href="https://example.org">far</a>'
    )
    faults, elsewhere = check(tmp_path)
    assert faults == [
        "a.html: no such place: #y",
        "a.html: no such place: sub/index.html#low",
        "a.html: no file for gone.html",
        "a.html: no file for gone.png",
        "a.html: <script> loads https://cdn.example/x.js",
    ]
    assert elsewhere == {"https://cdn.example/x.js": 1, "https://example.org": 1}
    assert check(tmp_path / "nothing")[0]


def test_markup_is_code_or_a_fault(tmp_path):
    (tmp_path / "a.html").write_text(
        "<p>.. program:: memokern .. rubric:: Usage</p><p>{py:class}`x`</p><p>12:00: a</p>"
        "<pre>.. code-block:: shell</pre><code>:math:`x`</code><p>see :doc:`b`, ...</p>"
    )
    faults, _ = check(tmp_path)
    assert faults == [
        f"a.html: markup left as text: {left}"
        for left in (".. program::", ".. rubric::", "{py:class}`", ":doc:`")
    ]
