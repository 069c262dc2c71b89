//! [`Settings::open`]: from settings to the device.

use std::{io, sync::Arc};

use blkdev::Device;

use crate::{reconnect, settings::Settings};

impl Settings {
    /// Opens the device.
    ///
    /// # Errors
    /// What is missing among the settings, or why the device cannot be opened: one line with the path in it. The
    /// [kind](io::Error::kind) is the reason, the same in all drivers:
    ///
    /// | kind | reason |
    /// |---|---|
    /// | `NotFound` | there is no such file, socket, device or namespace |
    /// | `PermissionDenied` | this user may not open it |
    /// | `ReadOnlyFilesystem`, `ExecutableFileBusy` | it cannot be written, and `read-only` is not set |
    /// | `ResourceBusy` | another process uses it |
    /// | `InvalidInput` | a setting is missing or invalid, more queues are requested than there are, or it is not a device of that kind |
    /// | `InvalidData` | the device or the back end violates its protocol |
    /// | `Unsupported` | the kernel or the device lacks a feature |
    /// | `TimedOut` | no answer in time; vhost-user back ends with another front end do this |
    /// | `ConnectionRefused`, `ConnectionReset` | no process behind the socket, or it hangs up |
    /// | `NotConnected` | the device has failed or was removed |
    ///
    /// For other errors of the system, [`Context::os_error`](blkdev::Context::os_error) returns the errno.
    pub fn open(&self) -> io::Result<Arc<dyn Device>> {
        reconnect::open(self)
    }
}
