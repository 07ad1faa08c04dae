"""Answering to the names `unsloth`, `unsloth_zoo` and, for a script alone, to a few names of `trl` and `transformers`.

Three means, all of Python's own import system, all taken back by `DropIn.stop`:

- `unsloth` and `unsloth_zoo` belong to no one else in the process, so a finder on `sys.meta_path` makes modules of
  those names whose attributes are this library's. An installed Unsloth is neither imported nor changed.
- `trl` and `transformers` are needed as they are by this library, by PEFT and by each other. Their entries in
  `sys.modules` become stand-ins that forward everything to the real modules, except that for a few names it matters who
  asks: the script, a notebook's cell or the user's own modules get ours; code of an installed package the real one.
  The real modules and classes are not written to, and nothing is rewritten or compiled from changed text.
- `vllm` is found by the user's own code alone, and only where it is not installed: libraries look for it, too, to
  find out whether they may use it.
"""

from __future__ import annotations

import site
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import spec_from_loader
from pathlib import Path
from types import FrameType, ModuleType, TracebackType
from typing import Any

from pronghorn import __version__
from pronghorn.compat.model_ids import redirect
from pronghorn.compat.names import INSTEAD, LATER, MODULES, REPLACED
from pronghorn.errors import DropInUnavailable, NotInDropIn, nearest
from pronghorn.importing import collector_paused

_ALIASED = ("unsloth", "unsloth_zoo")
#: Found for the user's own code only.
_FOR_SCRIPTS = "vllm"
#: Packages whose code always sees the real modules, also where they are installed from a clone.
_LIBRARIES = (
    "pronghorn",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "torch",
    "huggingface_hub",
)
_PACKAGES = tuple(
    str(Path(path)) + "/"
    for path in {
        *(sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")),
        *site.getsitepackages(),
        site.getusersitepackages(),
    }
)


def resolve(home: str) -> Any:
    """The object at "module:attribute"."""
    module, _, attribute = home.partition(":")
    _hide()
    with collector_paused():
        return getattr(import_module(module), attribute)


def _hide() -> None:
    """Take what only the user's code may find out of `sys.modules`; whoever imported it holds it."""
    if isinstance(sys.modules.get(_FOR_SCRIPTS), AliasModule):
        del sys.modules[_FOR_SCRIPTS]


class AliasModule(ModuleType):
    """A module of another library's name, whose attributes are this library's."""

    def __getattr__(self, name: str) -> Any:
        homes = MODULES[self.__name__]
        if name in homes:
            return resolve(homes[name])
        if name.startswith("__") or f"{self.__name__}.{name}" in MODULES:
            raise AttributeError(name)  # a submodule: the import statement looks for it next
        raise NotInDropIn(
            f"{self.__name__}.{name} has no counterpart in pronghorn",
            fix=INSTEAD.get(name)
            or nearest(name, homes)
            or f"leave it out; {self.__name__} has {', '.join(sorted(homes))}",
        )

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *MODULES[self.__name__]})


class AliasFinder(Loader, MetaPathFinder):
    """Finds `unsloth`, `unsloth_zoo` and their submodules, before an installed Unsloth is looked for."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        if top == _FOR_SCRIPTS and (
            fullname not in MODULES or not asked_by_user(_importer()) or PathFinder.find_spec(top) is not None
        ):
            return None
        if top not in (*_ALIASED, _FOR_SCRIPTS):
            return None
        if fullname not in MODULES:
            raise NotInDropIn(
                f"the module {fullname} has no counterpart in pronghorn",
                fix=INSTEAD.get(fullname.split(".")[1])
                or nearest(fullname, MODULES)
                or f"import from {', '.join(sorted(MODULES))}",
            )
        return spec_from_loader(fullname, self, origin="pronghorn", is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AliasModule(spec.name, f"pronghorn's part of what `{spec.name}` offers.")

    def exec_module(self, module: ModuleType) -> None:
        """Its attributes are looked up when they are asked for."""


class StandIn(ModuleType):
    """A real module, in which the user's own code finds a few names of this library.

    Args:
        real: the module that everything else comes from.
        ours: name -> object; resolved already, because finding them imports the real module.
        later: name -> home, looked up when the user's code asks.
    """

    def __init__(self, real: ModuleType, ours: Mapping[str, Any], later: Mapping[str, str]) -> None:
        super().__init__(real.__name__, real.__doc__)
        own = {"_real": real, "_ours": dict(ours), "_later": later}
        # The import system reads these from the module's dictionary.
        own |= {
            name: getattr(real, name)
            for name in ("__spec__", "__loader__", "__package__", "__path__", "__file__")
            if hasattr(real, name)
        }
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        ours, later = self.__dict__["_ours"], self.__dict__["_later"]
        if (name in ours or name in later) and asked_by_user(sys._getframe(1)):
            return ours[name] if name in ours else resolve(later[name])
        return getattr(self.__dict__["_real"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_real"], name, value)  # a submodule that was imported just now

    def __dir__(self) -> list[str]:
        return dir(self.__dict__["_real"])

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, (self.__name__,)


def asked_by_user(frame: FrameType) -> bool:
    """Whether a frame runs a script, a cell or a module of the user's, not code of an installed package."""
    name, file = frame.f_globals.get("__name__", ""), frame.f_globals.get("__file__")
    if name.partition(".")[0] in _LIBRARIES:
        return False
    return file is None or not str(Path(file).absolute()).startswith(_PACKAGES)


class DropIn:
    """Within this context, and after `start` for good, scripts for Unsloth find this library.

    Args:
        models: model id of a script -> folder or id that is loaded instead; "" stands for every id under `unsloth/`.

    Raises:
        DropInUnavailable: Unsloth itself is loaded in this process.
    """

    def __init__(self, models: Mapping[str, str] | None = None) -> None:
        self._models = dict(models or {})
        self._finder = AliasFinder()
        self._stands: dict[str, StandIn] = {}

    def start(self) -> DropIn:
        for name in _ALIASED:
            if name in sys.modules and not isinstance(sys.modules[name], AliasModule):
                raise DropInUnavailable(
                    f"{name} itself is loaded in this process and has changed Transformers and TRL for all of it",
                    fix="start anew, and ask for pronghorn before anything imports it",
                )
        if is_active():  # a script that asks for it itself, run by the command
            return self
        ours = {
            module: {name: resolve(home) for name, home in names.items()}
            for module, names in REPLACED.items()
        }
        redirect(self._models)
        sys.meta_path.insert(0, self._finder)
        for module, names in ours.items():
            self._stands[module] = StandIn(sys.modules[module], names, LATER.get(module, {}))
            sys.modules[module] = self._stands[module]
        print(announcement(), file=sys.stderr, flush=True)
        return self

    def stop(self) -> None:
        """Take back everything `start` put there; nothing where another one had started before."""
        if self._finder not in sys.meta_path:
            return
        redirect({})
        for module, stand_in in self._stands.items():
            if sys.modules.get(module) is stand_in:
                sys.modules[module] = stand_in.__dict__["_real"]
        self._stands = {}
        sys.meta_path.remove(self._finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, AliasModule)]:
            del sys.modules[name]

    def __enter__(self) -> DropIn:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def _importer() -> FrameType:
    """The frame whose import, or search for a module, is under way."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_globals.get("__name__") == __name__
        or frame.f_globals.get("__name__", "").partition(".")[0] in ("importlib", "_frozen_importlib")
    ):
        frame = frame.f_back
    return frame


def is_active() -> bool:
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


def announcement() -> str:
    """Which library answers."""
    try:
        beside = f"the installed unsloth {version('unsloth')} is not used"
    except PackageNotFoundError:
        beside = "no unsloth is installed"
    return f"pronghorn {__version__} stands in for unsloth; {beside}"
