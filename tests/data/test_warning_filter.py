import warnings

import pytest

from anomalymatch.data.warning_filter import ignore_warnings


def warn(module: str) -> None:
    warnings.warn_explicit("damaged", UserWarning, "file.py", 1, module=module)


def test_only_warnings_of_the_module_are_ignored_and_only_in_the_block() -> None:
    before = list(warnings.filters)
    with ignore_warnings(r"PIL\."):
        warn("PIL.Image")
        with ignore_warnings(r"astropy\."):
            warn("astropy.io")
        for module in ("astropy.io", "numpy"):
            with pytest.raises(UserWarning, match="damaged"):
                warn(module)
    with pytest.raises(UserWarning, match="damaged"):
        warn("PIL.Image")
    assert list(warnings.filters) == before


def test_filters_may_be_reset_in_the_block() -> None:
    with warnings.catch_warnings():
        with ignore_warnings(r"PIL\."):
            warnings.resetwarnings()
        assert not warnings.filters
