"""A program on SGLang's own frontend; run with the URL of a server, prints what came as JSON."""

# The package's own __init__ wants its kernels, and its frontend a notebook: both are left out.
import importlib.util
import json
import sys
import types
from typing import Any

package = types.ModuleType("sglang")
found = importlib.util.find_spec("sglang")
assert found is not None
package.__path__ = list(found.submodule_search_locations or ())
sys.modules["sglang"] = package
notebook = types.ModuleType("IPython.display")
notebook.HTML = notebook.display = print  # type: ignore[attr-defined]
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython.display"] = notebook

sgl = importlib.import_module("sglang.lang.api")
endpoint = importlib.import_module("sglang.lang.backend.runtime_endpoint")


@sgl.function  # type: ignore[untyped-decorator]
def program(s: Any) -> None:
    s += "Once upon a time" + sgl.gen("text", max_tokens=8, temperature=0)
    s += " It is " + sgl.select("colour", choices=["red", "blue"])
    s += " and " + sgl.gen("number", max_tokens=4, dtype=int)


backend = endpoint.RuntimeEndpoint(sys.argv[1])
sgl.set_default_backend(backend)
state = program.run()
print(
    json.dumps(
        {
            "model": backend.get_model_name(),
            **{name: state[name] for name in ("text", "colour", "number")},
            "finish": state.get_meta_info("text")["finish_reason"],
            "pieces": list(program.run(stream=True).text_iter("text")),
            "batch": [each["text"] for each in program.run_batch([{}] * 3, num_threads=3)],
        }
    )
)
