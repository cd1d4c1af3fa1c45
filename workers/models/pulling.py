"""Brings weights to this machine: from the mirror, else from their authors' servers. Puts only whole files in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path

from db.settings import settings
from workers.models.download import AbsentThere, Manner, download
from workers.models.files import is_present, weights_dir, weights_path
from workers.models.folders import PATTERNS
from workers.models.loading import require_libraries
from workers.models.mirror import Mirror, mirror_of_settings, open_mirror
from workers.models.own import OwnModel, is_own, parse_own, require_own_name, toml_path, write_own
from workers.models.part_file import Progress, Wanted, drop, exclusive_part, put_in_place, wanted_of
from workers.models.registry import MODELS, find_model, spec_of, with_base
from workers.models.spec import ModelSpec, UnknownModelError, WeightsError
from workers.models.weights import remedy, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Bringing:
    """How weights are brought. while_waiting: called while another process brings the same file.

    is_public: whether the authors' servers are asked for what the mirror lacks. A worker asks the mirror alone.
    """

    progress: Progress = lambda done, total: None
    while_waiting: Callable[[], object] = lambda: None
    manner: Manner = field(default_factory=Manner)
    is_public: bool = True


def pull(spec: ModelSpec, bringing: Bringing | None = None) -> Path:
    """Bring this model's weights, unless they are present, and return their path.

    Continues where an earlier download of the same file stopped. The file gets its name only when its sha256 is the
    pinned one. It then replaces a wrong file there. A second pull of the same file waits for the first.

    Raises WeightsError when the disk has no room, when nobody has the file or somebody has another one, or after
    several failed attempts; TransientError when a mirror in a bucket does not answer. The received bytes stay for the
    next pull, unless they are wrong.
    """
    bringing = bringing or Bringing()
    path = weights_path(spec)
    verified = verify(spec)
    if verified.ok:
        return path
    if spec.hub is not None:
        return _pull_folder(spec, spec.hub, path)
    mirror = mirror_of_settings(bringing.manner)
    if not spec.is_own and spec.url is None:
        raise WeightsError(f"{path}: {verified.found}; {remedy(spec)}")
    if mirror is None and spec.url is None:
        raise WeightsError(f"{path}: {verified.found}, and MASKFLEET_WEIGHTS_MIRROR is not set; {remedy(spec)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_part(path, bringing.while_waiting) as part:
            if verify(spec).ok:  # we waited for another process, which brought it
                drop(part)
                return path
            _fill(spec, mirror, part, bringing)
            put_in_place(part, path)
    except OSError as error:
        raise WeightsError(f"{spec.name}: cannot write {path}: {error.strerror or error}; {_for_disk(path)}") from error
    return path


def pull_named(name: str, bringing: Bringing) -> list[Path]:
    """`pull` by name. A model that is unknown here is taken from the mirror, with its TOML and its base."""
    if name not in MODELS and not is_own(name):
        mirror = mirror_of_settings(bringing.manner)
        if mirror is None:
            find_model(name)
        own = _ask_mirror(name, mirror)
        return _pull_own(own, bringing)
    return [pull(spec, bringing) for spec in with_base(find_model(name))]


def bring_for_job(name: str, check: Callable[[ModelSpec], None], bringing: Bringing) -> None:
    """Take the model of a job from the mirror, when it is absent here and a mirror is set.

    check: raises when this is not the model that the job means. Nothing is stored then. Raises what `pull` raises too.
    """
    if settings().weights_mirror is None:
        return
    if name not in MODELS and not is_own(name):
        own = _ask_mirror(name, mirror_of_settings(bringing.manner))
        check(spec_of(own))
        _pull_own(own, bringing)
        return
    for spec in with_base(find_model(name)):
        if spec.hub is None and not is_present(spec):
            pull(spec, bringing)


@contextmanager
def fetched(
    address: str, *, name: str, sha256: str, max_bytes: int, show: Progress, manner: Manner | None = None
) -> Iterator[Path]:
    """A checkpoint from an s3:// or https:// address as a file in the weights folder, while the block runs.

    Raises WeightsError when it is absent, has another sha256 or more than max_bytes; TransientError when a bucket does
    not answer.
    """
    prefix, _, file = address.rpartition("/")
    if not file or prefix.endswith(":/"):
        raise WeightsError(f"{address}: names no file, expected s3://bucket/key or https://host/path")
    suffix = ".safetensors" if file.partition("?")[0].endswith(".safetensors") else ".pth"
    path = weights_dir() / f".{name}.adding{suffix}"
    remedy = "run the same command again to continue, or download it yourself and give its path"
    wanted = Wanted(name=name, sha256=sha256, max_bytes=max_bytes, remedy=remedy, is_exact=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive_part(path) as part:
            open_mirror(prefix, manner or Manner()).fill(file, wanted, part, show)
            put_in_place(part, path)
        yield path
    except OSError as error:
        raise WeightsError(f"{name}: cannot write {path}: {error.strerror or error}") from error
    finally:
        path.unlink(missing_ok=True)


def push(spec: ModelSpec, address: str | None, manner: Manner | None = None) -> list[str]:
    """Put a model, and its base, into the mirror. Returns the addresses of its files there.

    address: a folder or s3://bucket/prefix instead of MASKFLEET_WEIGHTS_MIRROR. Raises WeightsError when the weights
    here are not the right ones, and what `Mirror.put` raises.
    """
    address = address or settings().weights_mirror
    if address is None:
        raise WeightsError("no mirror: set MASKFLEET_WEIGHTS_MIRROR, or give --to FOLDER or --to s3://bucket/prefix")
    mirror = open_mirror(address, manner or Manner())
    stored: list[str] = []
    for each in with_base(spec):
        if each.hub is not None:
            raise WeightsError(f"{each.name} comes as a folder: copy {weights_path(each)} to the machines that need it")
        verified = verify(each)
        if not verified.ok:
            raise WeightsError(f"{each.name}: {verified.path} is {verified.found}; {remedy(each)}")
        files = [weights_path(each), *([toml_path(each.name)] if each.is_own else [])]  # a TOML never without weights
        for file in files:
            mirror.put(file.name, file)
            stored.append(f"{address.rstrip('/')}/{file.name}")
    return stored


def _ask_mirror(name: str, mirror: Mirror | None) -> OwnModel:
    """What the mirror says about a model that is unknown here. Raises UnknownModelError when it has none."""
    if mirror is None:
        raise UnknownModelError(f"unknown model {name!r}, and MASKFLEET_WEIGHTS_MIRROR is not set")
    require_own_name(name)
    file = toml_path(name).name
    try:
        content = mirror.read(file, name)
    except AbsentThere as error:
        raise UnknownModelError(f"unknown model {name!r}: neither here nor in the mirror ({error})") from error
    return parse_own(content, name=name, where=f"{settings().weights_mirror}/{file}")


def _pull_own(own: OwnModel, bringing: Bringing) -> list[Path]:
    """The weights first, then the TOML, so that a model with a name here always has its weights."""
    spec = spec_of(own)
    bases = [] if own.base is None else _pull_base(own, own.base, bringing)
    path = pull(spec, bringing)
    write_own(own)
    with_base(spec)
    return [*bases, path]


def _pull_base(own: OwnModel, base: str, bringing: Bringing) -> list[Path]:
    """The base alone. A mirror could name a base of the base, and so on in a circle."""
    if base in MODELS or is_own(base):
        return pull_named(base, bringing)
    found = _ask_mirror(base, mirror_of_settings(bringing.manner))
    if found.base is not None:
        raise WeightsError(f"{own.name}: its base {base} is built on {found.base}, expected a whole {own.architecture}")
    return _pull_own(found, bringing)


def _fill(spec: ModelSpec, mirror: Mirror | None, part: BufferedRandom, bringing: Bringing) -> None:
    wanted = wanted_of(spec)
    if mirror is not None:
        try:
            return mirror.fill(spec.weights_file, wanted, part, bringing.progress)
        except AbsentThere:
            if spec.url is None or not bringing.is_public:
                raise
    assert spec.url is not None
    return download(wanted, spec.url, part, bringing.progress, bringing.manner)


def _for_disk(path: Path) -> str:
    return f"put the file there yourself, or make {path.parent} writable"


def _pull_folder(spec: ModelSpec, hub: str, folder: Path) -> Path:
    """Download a folder of the hub, with HF_TOKEN if it is gated. Continues where an earlier pull stopped."""
    require_libraries(f"models pull {spec.name}", ("huggingface_hub",))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        snapshot_download(hub, local_dir=folder, allow_patterns=list(PATTERNS))
    except GatedRepoError as error:
        raise WeightsError(
            f"{spec.name}: {hub} is only for people who accept its licence ({spec.licence}): accept it at "
            f"https://huggingface.co/{hub}, set HF_TOKEN to a token of that account, then {remedy(spec)} again"
        ) from error
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{spec.name}: cannot download {hub}: {error}; {remedy(spec)} again, or copy its folder to {folder}"
        ) from error
    return folder
