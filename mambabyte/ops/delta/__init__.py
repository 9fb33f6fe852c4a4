"""The gated delta rule (Gated DeltaNet, KDA): its definition and its chunked form."""
