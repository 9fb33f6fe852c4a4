"""Captions of the memory study's tables."""

from __future__ import annotations

from analysis.studies.drawing import Words

TABLES: dict[str, Words] = {
    "saved": "Bytes kept for the backward pass: closed form and count by hooks.",
    "peaks": "Peak bytes of forward and backward above weights and AdamW: closed form and "
             "profiler.",
    "mixers": "Every mixer, one layer in float32: bytes kept for the backward pass and peak above "
              "weights and AdamW by the closed form, and their ratios to count and profiler.",
    "five_to_seven": "Full tensors of one scan of the document's form that are alive, moment by "
                     "moment, at length 2048 and chunk 32: closed form, and count by hooks or peak "
                     "by the profiler.",
    "full_tensors": "Tensors of B L D N float32 elements: kept for the backward pass (closed form, "
                    "count) and needed besides, at length 2048 and chunk 32. What the fused form "
                    "keeps is one state of each channel every few steps.",
    "terms": "What one layer of the document's original step (64 x 2048, chunk 32) keeps.",
    "devices": "What the document's original step (64 x 2048) needs, and the largest batch at "
               "context 1024 that fits common devices, for mamba_byte (M), its 3:1 hybrid (MMMA) "
               "and the other mixers. An allowance for the CUDA context is included.",
    "device_contexts": "The same for the largest context at batch 16.",
    "document": "The document's statements about memory, in its numbers and in ours.",
    "cuda": lambda run: "Bytes kept and peak of a training step on a GPU: closed form, and the "
                        f"allocator of a GPU ({run.values['cuda_gpu'].value}). Three training "
                        "steps each; the peak is that of the last.",
    "libraries": "The one constant of the closed form that is not derived (what the matrix "
                 "libraries hold on a GPU): fitted to some of those steps, judged by the peaks of "
                 "the others.",
}
