//! A device whose cgroup's limit follows its balloon.
#![allow(unsafe_code, reason = "exports symbols to C")]

use crate::boundary::{Outcome, Refusal};
use crate::device::{aerostat_device, on_device};
use crate::handle;
use crate::versioned::{Output, Versioned};
use ::aerostat_device::{Accountant, NodeId};
use aerostat_reclaim::cgroup::{Cgroup, CgroupError};
use aerostat_reclaim::ledger::attached::{AttachError, AttachedAccount, AttachedCgroup};
use std::ffi::{CStr, OsStr, c_char, c_int};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// Room between what the cgroup occupies and the lowest limit it gets.
const SLACK_BYTES: u64 = 16 << 20;

/// The account of a device's cgroup. limit_bytes + pool_bytes equals budget_bytes at every instant.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct aerostat_cgroup_account {
    /// sizeof(struct aerostat_cgroup_account), set by the caller.
    pub size: u32,
    /// 0.
    pub reserved0: u32,
    /// The cgroup's memory.high when it was attached.
    pub budget_bytes: u64,
    /// What it is now.
    pub limit_bytes: u64,
    /// What the balloon took out of it: free for others.
    pub pool_bytes: u64,
    /// How often the limit could not be moved, for example since the cgroup is gone.
    pub failures: u64,
    /// 0.
    pub reserved: [u64; 3],
}

// SAFETY: integers only, the size first.
unsafe impl Versioned for aerostat_cgroup_account {
    const NAME: &'static str = "aerostat_cgroup_account";
    const FIRST_BYTES: usize = 64;
}

const _: () = assert!(size_of::<aerostat_cgroup_account>() == 64);

/// The joint between the device, which knows no cgroups, and the books, which know no devices.
#[derive(Debug)]
pub(crate) struct Joint(AttachedCgroup<Cgroup>);

impl Accountant for Joint {
    fn reclaimed(&self, _: Option<NodeId>, bytes: u64) {
        self.0.reclaimed(bytes);
    }

    fn returning(&self, _: Option<NodeId>, bytes: u64) {
        self.0.returning(bytes);
    }

    fn emptied(&self) {
        self.0.emptied();
    }
}

impl From<AttachError> for Refusal {
    fn from(error: AttachError) -> Self {
        let errno = match &error {
            AttachError::NoLimit => libc::ENODATA,
            AttachError::Cgroup(CgroupError::Gone { .. }) => libc::ENOENT,
            AttachError::Cgroup(CgroupError::NotV2 { .. }) => libc::ENOTSUP,
            AttachError::Cgroup(CgroupError::NoMemoryController { .. }) => libc::ENODEV,
            AttachError::Cgroup(CgroupError::Io { source, .. }) => {
                source.raw_os_error().unwrap_or(libc::EIO)
            }
            AttachError::Cgroup(_) => libc::EIO,
        };
        Self::Cgroup {
            errno,
            message: error.to_string(),
        }
    }
}

/// Lets the limit of a cgroup follow the device's balloon: memory.high of the cgroup at path (below
/// /sys/fs/cgroup, version 2), which has to be set to what the VM may occupy; that is the budget.
///
/// When the balloon has given memory back to the host, the limit falls by what has left, never below
/// what the cgroup occupies and 16 MiB. It is raised again before the guest is told that it has memory
/// back (invariant I5). So the limits of all VMs together never exceed what they were given, and what
/// balloons took can be given to others. Attach it before the guest inflates: what is in the balloon
/// already does not count. Do not let aerostatd keep the same limit.
///
/// Returns: 0, or -EALREADY (a cgroup is attached), -ENODATA (memory.high is "max"), -ENOENT (no such
/// cgroup), -ENOTSUP (not cgroup version 2), -ENODEV (the memory controller is not enabled there),
/// -EFAULT (a pointer is NULL), or what the operating system answered.
///
/// Threads: any. The threads that discard and those that serve the deflate queue read and write limits:
/// a write for each 4 MiB that leave, and one for each deflate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_attach_cgroup(
    device: *mut aerostat_device,
    path: *const c_char,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let handle = unsafe { handle::get(device) };
    on_device(handle, |device| {
        if path.is_null() {
            return Err(Refusal::Null("path"));
        }
        // SAFETY: not NULL, and a string that ends in a zero byte (the header's rule for pointers).
        let path = unsafe { CStr::from_ptr(path) };
        let path = Path::new(OsStr::from_bytes(path.to_bytes()));
        handle::required(handle)?.cgroup.attach(device, path)
    })
}

/// Lets the limit be: the cgroup gets its whole budget again, and the balloon no longer moves it.
///
/// Returns: 0, also without an attached cgroup, or -EFAULT (device is NULL).
///
/// Threads: any.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_detach_cgroup(device: *mut aerostat_device) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let handle = unsafe { handle::get(device) };
    on_device(handle, |device| {
        handle::required(handle)?.cgroup.detach(device);
        Ok(0)
    })
}

/// Tells the account of the attached cgroup.
///
/// Returns: 0, or -ENOTCONN (no cgroup is attached), -EMSGSIZE (out->size is too small), -EFAULT (a
/// pointer is NULL).
///
/// Threads: any. Waits for a limit that is being written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn aerostat_device_query_cgroup(
    device: *const aerostat_device,
    out: *mut aerostat_cgroup_account,
) -> c_int {
    // SAFETY: NULL or alive (the header's rule for handles).
    let handle = unsafe { handle::get(device) };
    on_device(handle, |_| {
        // SAFETY: NULL, or as long as its size says (the header's rule for pointers).
        let out = unsafe { Output::new(out) }?;
        let account = handle::required(handle)?.cgroup.account()?;
        out.fill(&aerostat_cgroup_account {
            budget_bytes: account.budget_bytes,
            limit_bytes: account.limit_bytes,
            pool_bytes: account.pool_bytes,
            failures: account.failures,
            ..aerostat_cgroup_account::default()
        });
        Ok(0)
    })
}

/// The cgroup of one device; its limit is its budget again when the device goes.
#[derive(Debug, Default)]
pub(crate) struct AttachedTo(parking_lot::Mutex<Option<Arc<Joint>>>);

impl AttachedTo {
    fn attach(&self, device: &::aerostat_device::Device, path: &Path) -> Outcome<c_int> {
        let mut attached = self.0.lock();
        if attached.is_some() {
            return Err(Refusal::Cgroup {
                errno: libc::EALREADY,
                message: "a cgroup is attached already; detach it first".to_owned(),
            });
        }
        let cgroup = Cgroup::open(path).map_err(AttachError::from)?;
        let joint = Arc::new(Joint(AttachedCgroup::new(cgroup, SLACK_BYTES)?));
        device.set_accountant(Some(Arc::clone(&joint) as Arc<dyn Accountant>));
        *attached = Some(joint);
        Ok(0)
    }

    fn detach(&self, device: &::aerostat_device::Device) {
        let mut attached = self.0.lock();
        device.set_accountant(None);
        release(attached.take());
    }

    fn account(&self) -> Outcome<AttachedAccount> {
        let attached = self.0.lock();
        let joint = attached.as_ref().ok_or_else(|| Refusal::Cgroup {
            errno: libc::ENOTCONN,
            message: "no cgroup is attached; call aerostat_device_attach_cgroup() first".to_owned(),
        })?;
        Ok(joint.0.account())
    }
}

impl Drop for AttachedTo {
    fn drop(&mut self) {
        release(self.0.get_mut().take());
    }
}

/// Gives the cgroup its budget again.
fn release(joint: Option<Arc<Joint>>) {
    let Some(joint) = joint else { return };
    joint.0.emptied();
    let left = joint.0.account();
    if left.pool_bytes > 0 {
        log::warn!(
            "memory.high of a detached cgroup stays {} bytes below its budget: it could not be written",
            left.pool_bytes
        );
    }
}
