"""Progress bars on stderr, silent where that is no terminal."""

try:
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("datasets need tqdm: pip install 'pcl_ext[cli]'") from error


def progress(what: str, total: int, unit: str = " users") -> tqdm:
    """A bar to call .update(n) on, closed at the end of a `with`; what ends within a second shows none."""
    return tqdm(total=total, desc=what, unit=unit, disable=None, leave=False, delay=1.0)
