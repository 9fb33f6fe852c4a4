"""Study: time and energy of forms and mixers against length."""

INDEXED = "indexed loop"  # the second document's loop: one index a step, no form of the package
INDEXED_ABOUT = "the recurrence with every step's inputs indexed in the loop, as the second " \
    "document has it"
