//! Calls that not every device has.

use super::{Device, Result, Symbols, checked, size_of_u32};
use aerostat::aerostat_node_balloon;

impl Device {
    /// The features that were selected, by whomever.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn features(&self) -> Result<u64> {
        let mut features = 0;
        call!(
            self.symbols,
            aerostat_device_features(self.handle, &raw mut features)
        )?;
        Ok(features)
    }

    /// Sets a target for each of the guest's nodes.
    ///
    /// # Errors
    /// As the header says.
    pub fn set_node_targets(&self, bytes: &[u64]) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_set_node_targets(self.handle, bytes.as_ptr(), bytes.len())
        )?;
        Ok(())
    }

    /// The balloon on one of the guest's nodes.
    ///
    /// # Errors
    /// None is documented for a live handle.
    pub fn query_node(&self, node: u32) -> Result<aerostat_node_balloon> {
        let mut balloon = aerostat_node_balloon {
            size: size_of_u32::<aerostat_node_balloon>(),
            ..Default::default()
        };
        call!(
            self.symbols,
            aerostat_device_query_node(self.handle, node, &raw mut balloon)
        )?;
        Ok(balloon)
    }

    /// Lets the guest have more than it booted with.
    ///
    /// # Errors
    /// As the header says.
    pub fn set_extra_grant(&self, bytes: u64) -> Result<()> {
        call!(
            self.symbols,
            aerostat_device_set_extra_grant(self.handle, bytes)
        )?;
        Ok(())
    }

    /// Carries out a command of VMware's protocol; returns status and result.
    ///
    /// # Errors
    /// As the header says.
    pub fn vmware_command(&self, command: u64, arguments: [u64; 2]) -> Result<(u32, u64)> {
        let (mut status, mut result) = (u32::MAX, u64::MAX);
        let [first, second] = arguments;
        call!(
            self.symbols,
            aerostat_vmware_command(
                self.handle,
                command,
                first,
                second,
                &raw mut status,
                &raw mut result
            )
        )?;
        Ok((status, result))
    }
}
