"""Put on PYTHONPATH by tests, so that the real commands in real processes know one more model: `stub`."""

from workers import models

models.MODELS["stub"] = models.ModelSpec(
    name="stub",
    family="stub",
    loader="stub_model:load",
    weights_file="none",
    url="https://example.invalid/none",
    sha256="5" * 64,
    size_bytes=0,
    parameter_count=0,
    prompts=("box", "points"),
    licence="Apache-2.0",
)
