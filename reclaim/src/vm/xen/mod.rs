//! Xen domains by their xenstore keys (X1 to X9; docs/xen-keys.md).
//!
//! A guest that has written `control/feature-balloon-vnode` = "1" gets one target for each virtual node,
//! the size of the ballooned area in KiB, in `memory/vnode<n>/target-balloon-size`; the old key
//! `memory/target` is removed then (X5). Other guests get the legacy view: `memory/target` is what is left
//! of `memory/static-max` (X9).

use std::{path::Path, time::Duration};

use self::store::Store;
use super::{Observation, Vm, VmError};
use crate::policy::{Capabilities, GuestMemory, NodeTarget};

mod store;

const KIB: u64 = 1024;

/// A domain.
#[derive(Debug)]
pub struct XenDomain {
    store: Store,
    /// Its directory in the store.
    home: String,
    target_bytes: Option<u64>,
}

impl XenDomain {
    /// Connects to xenstored at `path` and looks for domain number `domain`.
    ///
    /// # Errors
    /// Nobody is there, it is not xenstored, or there is no such domain.
    pub fn connect(path: &Path, timeout: Duration, domain: u32) -> Result<Self, VmError> {
        let mut vm = Self {
            store: Store::connect(path, timeout)?,
            home: format!("/local/domain/{domain}"),
            target_bytes: None,
        };
        vm.memory_bytes()?;
        Ok(vm)
    }

    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.home)
    }

    /// The value of a key that holds KiB. The guest writes some of them: what is no size is as good
    /// as no key.
    fn kib(&mut self, name: &str) -> Result<Option<u64>, VmError> {
        let key = self.key(name);
        let text = self.store.read(&key)?;
        Ok(text
            .and_then(|text| text.trim().parse::<u64>().ok())
            .and_then(|kib| kib.checked_mul(KIB)))
    }

    fn memory_bytes(&mut self) -> Result<u64, VmError> {
        let name = "memory/static-max";
        let why = "there is no such domain, or this is no number of KiB";
        self.kib(name)?
            .ok_or_else(|| self.store.refused(&self.key(name), why))
    }

    /// Whether the guest speaks the new interface (X4).
    fn has_vnodes(&mut self) -> Result<bool, VmError> {
        let key = self.key("control/feature-balloon-vnode");
        Ok(self
            .store
            .read(&key)?
            .is_some_and(|text| text.trim() == "1"))
    }

    /// The numbers of its virtual nodes; node 0 always exists.
    fn vnodes(&mut self) -> Result<Vec<u32>, VmError> {
        let key = self.key("memory");
        let mut nodes: Vec<u32> = self
            .store
            .directory(&key)?
            .iter()
            .filter_map(|name| name.strip_prefix("vnode")?.parse().ok())
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        if nodes.is_empty() {
            nodes.push(0);
        }
        Ok(nodes)
    }

    fn write_vnode(&mut self, node: u32, bytes: u64) -> Result<(), VmError> {
        let key = self.key(&format!("memory/vnode{node}/target-balloon-size"));
        self.store.write(&key, &(bytes / KIB).to_string())
    }

    /// Only the new interface is used from now on (X5).
    fn remove_old_key(&mut self) -> Result<(), VmError> {
        let key = self.key("memory/target");
        self.store.remove(&key)
    }

    /// The sum over all vnodes of one of their keys; `None` if no vnode has it.
    fn sum(&mut self, name: &str) -> Result<Option<u64>, VmError> {
        let mut sum = None;
        for node in self.vnodes()? {
            if let Some(bytes) = self.kib(&format!("memory/vnode{node}/{name}"))? {
                sum = Some(sum.unwrap_or(0_u64).saturating_add(bytes));
            }
        }
        Ok(sum)
    }
}

impl Vm for XenDomain {
    fn protocol(&self) -> &'static str {
        "xen"
    }

    fn peer_pid(&self) -> Option<u32> {
        // The memory of a domain is in no cgroup.
        None
    }

    fn observe(&mut self) -> Result<Observation, VmError> {
        let memory_bytes = self.memory_bytes()?;
        let vnodes = self.has_vnodes()?;
        let (target, actual) = if vnodes {
            (self.sum("target-balloon-size")?, self.sum("balloon-size")?)
        } else {
            let left = self.kib("memory/target")?;
            (left.map(|left| memory_bytes.saturating_sub(left)), None)
        };
        let target = target.or(self.target_bytes).unwrap_or(0);
        Ok(Observation {
            memory_bytes,
            reach_bytes: None,
            target_bytes: Some(target),
            // A guest that does not say is taken at its target.
            ballooned_bytes: actual.unwrap_or(target),
            running: true,
            guest: GuestMemory::default(),
            capabilities: Capabilities {
                per_node_targets: vnodes,
                ..Capabilities::default()
            },
        })
    }

    fn set_target_bytes(&mut self, bytes: u64) -> Result<(), VmError> {
        if self.has_vnodes()? {
            let nodes = self.vnodes()?;
            let count = u64::try_from(nodes.len()).unwrap_or(1).max(1);
            // Even shares in whole KiB; the first node has what is left over.
            let share = bytes / KIB / count * KIB;
            for (index, node) in nodes.into_iter().enumerate() {
                let rest = if index == 0 { bytes - share * count } else { 0 };
                self.write_vnode(node, share + rest)?;
            }
            self.remove_old_key()?;
        } else {
            let left = self.memory_bytes()?.saturating_sub(bytes);
            let key = self.key("memory/target");
            self.store.write(&key, &(left / KIB).to_string())?;
        }
        self.target_bytes = Some(bytes);
        Ok(())
    }

    fn set_node_targets(&mut self, targets: &[NodeTarget]) -> Result<(), VmError> {
        for target in targets {
            self.write_vnode(target.node.0, target.target_bytes)?;
        }
        self.target_bytes = Some(targets.iter().map(|target| target.target_bytes).sum());
        self.remove_old_key()
    }
}

#[cfg(test)]
mod tests;
