import re
from importlib.metadata import version
from pathlib import Path

import hf_skein
import hf_skein.kernels


ROOT = Path(__file__).parents[1]


def test_version_is_stated_once():
    assert re.search(r'^dynamic = \["version"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version("hf-skein") == hf_skein.__version__


def test_the_kernels_install_as_a_subpackage():
    assert Path(hf_skein.kernels.__file__).parent.name == "hf_skein_kernels"
    # A package right in kernels/ would shadow Hugging Face's `kernels` for programs started at the root.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names():
    assert set(hf_skein.__all__) == {"SkeinConfig", "configure", "register_baselines", "skein_attention"}
    assert all(getattr(hf_skein, name).__doc__ for name in hf_skein.__all__)
    assert hf_skein.convert.extend_positions.__doc__
