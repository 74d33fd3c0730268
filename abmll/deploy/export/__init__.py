"""An adapter handed on to those who do not have this package: PEFT's files, a merged model, or plain tensors.

`subject` is what is handed on; `peft`, `merged` and `tensors` write it, load it back from what they wrote and compare;
`report` is what they found, `model_card` and `usage` the README.md beside it. `push`
uploads it, and `command` is `launch/export.py`.
"""

from abmll.deploy.export.write import FORMATS, export_adapter

__all__ = ["FORMATS", "export_adapter"]
