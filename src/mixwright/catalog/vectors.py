"""The two files that may stand beside an adapter: a gate vector per site, and statistics of the backbone's activations.

gate.safetensors has one float32 vector (d_in) per site under the site's path; signature.safetensors has float32 tensors
under "<site>/mean", "<site>/variance", "<site>/count" and, where its owner saved one, "<site>/factor" (rank, d_in).
"""

from collections.abc import Mapping

from mixwright.catalog.header import Header, TensorEntry
from mixwright.catalog.layout import SiteLayout
from mixwright.catalog.refusal import Faults, quote

STATISTICS = {"mean", "variance", "count", "factor"}


def check_gates(header: Header, sites: Mapping[str, SiteLayout], where: str) -> None:
    """One float32 vector per adapted site. Raises CatalogError: TENSOR, DTYPE, SHAPE, INCOMPLETE."""
    faults = Faults(where)
    for name, entry in header.tensors.items():
        if name not in sites:
            faults.add("TENSOR", f"gate {quote(name)} is for a site that the adapter does not have.")
        else:
            _check(entry, (sites[name].d_in,), faults)
    missing = sorted(set(sites) - set(header.tensors))
    if missing:
        faults.add(
            "INCOMPLETE", f"{len(missing)} sites have no gate, the first is {quote(missing[0])}; each needs one."
        )
    faults.check()


def check_signatures(header: Header, sites: Mapping[str, SiteLayout], where: str) -> None:
    """Statistics of adapted sites, a mean and a variance for each that has any. Raises as `check_gates`."""
    faults = Faults(where)
    found: dict[str, set[str]] = {}
    for name, entry in header.tensors.items():
        path, _, statistic = name.rpartition("/")
        if path not in sites or statistic not in STATISTICS:
            faults.add(
                "TENSOR", f"signature {quote(name)} is no mean, variance, count or factor of a site of the adapter."
            )
            continue
        found.setdefault(path, set()).add(statistic)
        _check(entry, _shape(statistic, entry, sites[path].d_in), faults)
    for path, statistics in found.items():
        if not statistics >= {"mean", "variance"}:
            faults.add("INCOMPLETE", f"signature of {quote(path)} needs both mean and variance.")
    faults.check()


def _shape(statistic: str, entry: TensorEntry, d_in: int) -> tuple[int, ...]:
    if statistic == "factor":
        rank = entry.shape[0] if entry.shape else 1
        return (min(max(rank, 1), d_in), d_in)
    return () if statistic == "count" else (d_in,)


def _check(entry: TensorEntry, shape: tuple[int, ...], faults: Faults) -> None:
    if entry.dtype != "F32":
        faults.add("DTYPE", f"{quote(entry.name)} is {entry.dtype}; float32 is accepted.")
    if entry.shape != shape:
        faults.add("SHAPE", f"{quote(entry.name)} is {list(entry.shape)}; {list(shape)} is needed.")
