//! What the guest's buffers mean: each protocol translates between its wire format and the balloon
//! core, and knows nothing of how memory is discarded.

pub(crate) mod virtio_balloon;
