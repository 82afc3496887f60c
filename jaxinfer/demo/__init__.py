"""The bundled demo model: a small Llama that was trained by ``train.py`` on public-domain prose."""
