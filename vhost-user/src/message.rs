//! The messages of the vhost-user protocol, as bytes and as types.
//!
//! Specification: QEMU's `docs/interop/vhost-user.rst`, chapters "Message Specification" and
//! "Front-end message types". A message is a header of three native-endian `u32` (request, flags,
//! payload size), a payload, and descriptors as ancillary data. Nothing here trusts a length.

use std::os::fd::OwnedFd;

/// The length of a header.
pub(crate) const HEADER_BYTES: usize = 12;
/// The longest payload accepted. The largest that any message of ours needs is a memory table of
/// [`MAX_FDS`] regions, about 2 KiB; the configuration space of the standard ends at 4 KiB.
pub(crate) const MAX_PAYLOAD_BYTES: usize = 4096 + 12;
/// The most descriptors that one message may carry. Front-ends send up to 8 (the specification's
/// limit for SET_MEM_TABLE).
pub(crate) const MAX_FDS: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Feature bit that says the back-end speaks of protocol features at all.
pub(crate) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol feature bits ("Protocol features" of the specification).
pub(crate) mod protocol {
    /// Several queues; GET_QUEUE_NUM.
    pub(crate) const MQ: u64 = 1 << 0;
    /// NEED_REPLY is honoured.
    pub(crate) const REPLY_ACK: u64 = 1 << 3;
    /// SET_BACKEND_REQ_FD.
    pub(crate) const BACKEND_REQ: u64 = 1 << 5;
    /// GET_CONFIG, SET_CONFIG.
    pub(crate) const CONFIG: u64 = 1 << 9;
    /// RESET_DEVICE.
    pub(crate) const RESET_DEVICE: u64 = 1 << 13;
    /// ADD_MEM_REG, REM_MEM_REG.
    pub(crate) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// SET_STATUS, GET_STATUS.
    pub(crate) const STATUS: u64 = 1 << 16;
    /// All that this back-end offers.
    pub(crate) const OFFERED: u64 =
        MQ | REPLY_ACK | BACKEND_REQ | CONFIG | RESET_DEVICE | CONFIGURE_MEM_SLOTS | STATUS;
}

/// What a front-end asks for. Only the requests that this back-end serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    GetFeatures,
    SetFeatures,
    SetOwner,
    ResetOwner,
    SetMemTable,
    SetVringNum,
    SetVringAddr,
    SetVringBase,
    GetVringBase,
    SetVringKick,
    SetVringCall,
    SetVringErr,
    GetProtocolFeatures,
    SetProtocolFeatures,
    GetQueueNum,
    SetVringEnable,
    SetBackendReqFd,
    GetConfig,
    SetConfig,
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg,
    RemMemReg,
    SetStatus,
    GetStatus,
}

impl Request {
    /// The request with number `code`.
    pub(crate) fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            1 => Self::GetFeatures,
            2 => Self::SetFeatures,
            3 => Self::SetOwner,
            4 => Self::ResetOwner,
            5 => Self::SetMemTable,
            8 => Self::SetVringNum,
            9 => Self::SetVringAddr,
            10 => Self::SetVringBase,
            11 => Self::GetVringBase,
            12 => Self::SetVringKick,
            13 => Self::SetVringCall,
            14 => Self::SetVringErr,
            15 => Self::GetProtocolFeatures,
            16 => Self::SetProtocolFeatures,
            17 => Self::GetQueueNum,
            18 => Self::SetVringEnable,
            21 => Self::SetBackendReqFd,
            24 => Self::GetConfig,
            25 => Self::SetConfig,
            34 => Self::ResetDevice,
            36 => Self::GetMaxMemSlots,
            37 => Self::AddMemReg,
            38 => Self::RemMemReg,
            39 => Self::SetStatus,
            40 => Self::GetStatus,
            _ => return None,
        })
    }

    /// Whether the message may carry descriptors. They are closed unused in any other.
    fn carries_fds(self) -> bool {
        matches!(
            self,
            Self::SetMemTable
                | Self::SetVringKick
                | Self::SetVringCall
                | Self::SetVringErr
                | Self::SetBackendReqFd
                | Self::AddMemReg
                // "For compatibility [...] the back-end MAY accept messages with one file descriptor."
                | Self::RemMemReg
        )
    }

    /// Whether the front-end expects an answer of the message's own kind, so that no
    /// acknowledgement is sent besides.
    pub(crate) fn has_own_reply(self) -> bool {
        matches!(
            self,
            Self::GetFeatures
                | Self::GetProtocolFeatures
                | Self::GetQueueNum
                | Self::GetVringBase
                | Self::GetConfig
                | Self::GetMaxMemSlots
                | Self::GetStatus
        )
    }
}

/// Why a message cannot be understood. The stream is of no use after that.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("version {0} in a message header, expected 1")]
    Version(u32),
    #[error("a reply where a request was expected")]
    Reply,
    #[error("a payload of {0} bytes, more than any message has")]
    TooLong(u32),
    #[error("a payload of {got} bytes where {expected} were expected")]
    Size { got: usize, expected: usize },
    #[error("{got} file descriptors where {expected} were expected")]
    Fds { got: usize, expected: usize },
    #[error("{0} memory regions, expected 1 to 32")]
    Regions(u32),
}

/// The head of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) code: u32,
    flags: u32,
    pub(crate) payload_bytes: usize,
}

impl Header {
    /// Reads and checks a request's header.
    pub(crate) fn parse(bytes: [u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let mut fields = Fields(&bytes);
        let (code, flags, size) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if flags & VERSION_MASK != VERSION {
            return Err(Malformed::Version(flags & VERSION_MASK));
        }
        if flags & FLAG_REPLY != 0 {
            return Err(Malformed::Reply);
        }
        let payload_bytes = usize::try_from(size)
            .ok()
            .filter(|size| *size <= MAX_PAYLOAD_BYTES)
            .ok_or(Malformed::TooLong(size))?;
        Ok(Self {
            code,
            flags,
            payload_bytes,
        })
    }

    /// Whether the sender wants an acknowledgement.
    pub(crate) fn needs_reply(self) -> bool {
        self.flags & FLAG_NEED_REPLY != 0
    }
}

/// A message as it came in.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: Header,
    pub(crate) payload: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
}

impl Message {
    /// Checks that no descriptors came along if `request` carries none.
    pub(crate) fn check_fds(&self, request: Request) -> Result<(), Malformed> {
        if request.carries_fds() || self.fds.is_empty() {
            return Ok(());
        }
        Err(Malformed::Fds {
            got: self.fds.len(),
            expected: 0,
        })
    }

    /// The payload of a message that has none.
    pub(crate) fn empty(&self) -> Result<(), Malformed> {
        self.sized(0).map(|_| ())
    }

    /// A payload that is one number.
    pub(crate) fn number(&self) -> Result<u64, Malformed> {
        self.sized(8)?.u64()
    }

    /// A vring state description: the ring's index and a number.
    pub(crate) fn vring_state(&self) -> Result<(u32, u32), Malformed> {
        let mut fields = self.sized(8)?;
        Ok((fields.u32()?, fields.u32()?))
    }

    /// A vring address description.
    pub(crate) fn vring_addr(&self) -> Result<VringAddr, Malformed> {
        let mut fields = self.sized(40)?;
        Ok(VringAddr {
            index: fields.u32()?,
            flags: fields.u32()?,
            desc: fields.u64()?,
            used: fields.u64()?,
            avail: fields.u64()?,
        })
    }

    /// A ring's index and the descriptor for it: bit 8 says that there is none.
    pub(crate) fn vring_fd(&mut self) -> Result<(u32, Option<OwnedFd>), Malformed> {
        let value = self.number()?;
        let index = u32::from(value.to_le_bytes()[0]);
        let expected = usize::from(value & (1 << 8) == 0);
        if self.fds.len() != expected {
            return Err(Malformed::Fds {
                got: self.fds.len(),
                expected,
            });
        }
        Ok((index, self.fds.pop()))
    }

    /// The only descriptor of a message without other payload.
    pub(crate) fn single_fd(&mut self) -> Result<OwnedFd, Malformed> {
        let got = self.fds.len();
        match self.fds.pop() {
            Some(fd) if got == 1 => Ok(fd),
            _ => Err(Malformed::Fds { got, expected: 1 }),
        }
    }

    /// A configuration space description: offset, size, flags and the bytes.
    pub(crate) fn config(&self) -> Result<Config<'_>, Malformed> {
        let mut fields = Fields(&self.payload);
        let (offset, size, _flags) = (fields.u32()?, fields.u32()?, fields.u32()?);
        if usize::try_from(size).ok() != Some(fields.0.len()) {
            return Err(Malformed::Size {
                got: fields.0.len(),
                expected: usize::try_from(size).unwrap_or(usize::MAX),
            });
        }
        Ok(Config {
            offset,
            data: fields.0,
        })
    }

    /// The regions of a memory table.
    ///
    /// The payload may be longer than its regions need: Linux's virtio_uml always sends room for two.
    pub(crate) fn mem_table(&self) -> Result<Vec<MemRegion>, Malformed> {
        let mut fields = Fields(&self.payload);
        let (count, _padding) = (fields.u32()?, fields.u32()?);
        let regions = usize::try_from(count)
            .ok()
            .filter(|count| (1..=MAX_FDS).contains(count))
            .ok_or(Malformed::Regions(count))?;
        if regions != self.fds.len() {
            return Err(Malformed::Fds {
                got: self.fds.len(),
                expected: regions,
            });
        }
        (0..regions)
            .map(|_| MemRegion::parse(&mut fields))
            .collect()
    }

    /// The region of ADD_MEM_REG and REM_MEM_REG.
    pub(crate) fn mem_region(&self) -> Result<MemRegion, Malformed> {
        let mut fields = self.sized(40)?;
        fields.u64()?;
        MemRegion::parse(&mut fields)
    }

    fn sized(&self, expected: usize) -> Result<Fields<'_>, Malformed> {
        if self.payload.len() == expected {
            return Ok(Fields(&self.payload));
        }
        Err(Malformed::Size {
            got: self.payload.len(),
            expected,
        })
    }
}

/// Where a ring is, in addresses of the front-end's process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VringAddr {
    pub(crate) index: u32,
    pub(crate) flags: u32,
    pub(crate) desc: u64,
    pub(crate) used: u64,
    pub(crate) avail: u64,
}

/// A piece of the configuration space.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Config<'a> {
    pub(crate) offset: u32,
    pub(crate) data: &'a [u8],
}

/// A memory region description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemRegion {
    /// Where the guest sees it.
    pub(crate) gpa: u64,
    /// Its length.
    pub(crate) len_bytes: u64,
    /// Where the front-end has it.
    pub(crate) user_addr: u64,
    /// Where it starts in its file.
    pub(crate) offset_bytes: u64,
}

impl MemRegion {
    fn parse(fields: &mut Fields<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            gpa: fields.u64()?,
            len_bytes: fields.u64()?,
            user_addr: fields.u64()?,
            offset_bytes: fields.u64()?,
        })
    }
}

/// Takes native-endian numbers off the front of a payload.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let short = Malformed::Size {
            got: self.0.len(),
            expected: N,
        };
        let (field, rest) = self.0.split_first_chunk::<N>().ok_or(short)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.take().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.take().map(u64::from_ne_bytes)
    }
}

/// The bytes of a reply to a request with number `code`.
pub(crate) fn reply(code: u32, payload: &[u8]) -> Vec<u8> {
    encode(code, VERSION | FLAG_REPLY, payload)
}

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG ("Back-end message types").
///
/// Never with NEED_REPLY: nothing would be done about a failure, and a back-end that waits for the
/// answer deadlocks with a front-end that asks for the configuration first.
pub(crate) fn config_change() -> Vec<u8> {
    encode(2, VERSION, &[])
}

fn encode(code: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let size = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    for field in [code, flags, size] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(code: u32, flags: u32, size: u32) -> Result<Header, Malformed> {
        let mut bytes = [0; HEADER_BYTES];
        for (chunk, field) in bytes.chunks_exact_mut(4).zip([code, flags, size]) {
            chunk.copy_from_slice(&field.to_ne_bytes());
        }
        Header::parse(bytes)
    }

    fn message(payload: &[u8]) -> Message {
        Message {
            header: header(1, 1, 0).unwrap(),
            payload: payload.to_vec(),
            fds: Vec::new(),
        }
    }

    #[test]
    fn headers_are_checked() {
        assert!(!header(1, 1, 0).unwrap().needs_reply());
        assert!(header(1, 9, 8).unwrap().needs_reply());
        assert_eq!(header(1, 2, 0), Err(Malformed::Version(2)));
        assert_eq!(header(1, 5, 0), Err(Malformed::Reply));
        assert_eq!(header(1, 1, u32::MAX), Err(Malformed::TooLong(u32::MAX)));
    }

    #[test]
    fn payloads_of_every_length_are_refused_or_understood() {
        for len in 0..100 {
            let mut message = message(&vec![0xff; len]);
            assert_eq!(message.empty().is_ok(), len == 0);
            assert_eq!(message.number().is_ok(), len == 8);
            assert_eq!(message.vring_state().is_ok(), len == 8);
            assert_eq!(message.vring_addr().is_ok(), len == 40);
            assert_eq!(message.mem_region().is_ok(), len == 40);
            assert!(message.config().is_err());
            assert!(message.mem_table().is_err());
            assert_eq!(message.vring_fd().is_ok(), len == 8);
            assert!(message.single_fd().is_err());
        }
    }

    #[test]
    fn config_change_is_twelve_bytes() {
        let mut expected = Vec::new();
        for field in [2_u32, 1, 0] {
            expected.extend_from_slice(&field.to_ne_bytes());
        }
        assert_eq!(config_change(), expected);
    }
}
