"""How much memory is left, as the system tells it, in control groups of both versions too."""

import pytest

from memokern.util import memory


@pytest.fixture
def system(tmp_path):
    """Makes files as the system has them: by what they say, or None for none."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"

    def made(free=None, belongs=None, **files):
        (proc / "self").mkdir(parents=True)
        if free is not None:
            said = f"MemTotal: 9 kB\nMemAvailable:   {free} kB\n"
            (proc / "meminfo").write_text(said)
        if belongs is not None:
            (proc / "self/cgroup").write_text(belongs)
        for name, text in files.items():
            path = groups / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name.replace("-", ".")).write_text(text)
        return memory.available(proc, groups)

    return made


def test_this_system_tells():
    assert 1 << 24 < memory.available() < 1 << 50


def test_nobody_tells(system):
    assert system() == memory.ENDLESS


def test_what_the_system_has(system):
    assert system(free=300) == 300 * 1024


def test_a_group_of_the_second_version(system):
    files = {
        "a__memory-max": "max\n", "a__memory-stat": "anon 5\nfile 900\n",
        "a__b__memory-max": "1000\n", "a__b__memory-stat": "anon 300\nfile 600\n",
    }  # fmt: skip
    assert system(free=300, belongs="0::/a/b\n", **files) == 700


def test_a_group_above_allows_less(system):
    files = {
        "a__memory-max": "500\n", "a__memory-stat": "anon 100\n",
        "a__b__memory-max": "1000\n", "a__b__memory-stat": "anon 50\n",
    }  # fmt: skip
    assert system(belongs="0::/a/b\n", **files) == 400


def test_a_group_of_the_first_version(system):
    files = {
        "memory__c__memory-limit_in_bytes": "2000\n",
        "memory__c__memory-stat": "rss 1\ntotal_rss 1500\n",
    }
    assert system(belongs="5:cpu,cpuacct:/\n4:memory:/c\n0::/\n", **files) == 500


def test_a_container_has_its_group_at_the_root(system):
    files = {"memory-max": "1000\n", "memory-stat": "anon 1200\n"}
    assert system(belongs="0::/of/the/host\n", **files) == 0
