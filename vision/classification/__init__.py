"""Image classification: fine-tune any backbone on a folder of pictures with any adapter, and ask it about pictures.

`finetune(data, backbone, adapter)` trains and saves one folder; `load_finetuned` and the pipeline bring it back.
"""
