/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * aerostat.h - a virtio balloon device as a library
 *
 * This file is generated from the crate in ffi/; "make header" writes it anew.
 *
 * WHAT IT IS FOR
 *
 * A guest's balloon driver gives pages that it does not need to its balloon device. This library is
 * that device: it takes the pages, gives the host memory behind them back to the host, and keeps
 * books of it. A VMM links it, brings the transport (PCI, MMIO, vhost-user) and the guest's memory,
 * and says how large the balloon should be.
 *
 * TERMS
 *
 *   balloon      the pages that the guest has given and not taken back. Sizes, targets and `actual`
 *                are always those of the balloon, in bytes, never of the memory that is left.
 *   inflate      to put pages in; deflate: to take them out; report: to tell of pages that are free
 *                at the moment and stay the guest's.
 *   discard      to free the host memory behind a page. The guest finds zeros there afterwards; in a
 *                private mapping of a file it finds the file's contents (AEROSTAT_REGION_SHARED).
 *   gpa, hva     guest physical address; host virtual address, in this process.
 *   region       a contiguous piece of guest memory. table: all regions of a guest.
 *   frame        a page of the host, where that is larger than 4096 bytes.
 *   kick, call   the eventfds by which a guest notifies a device, and a device a guest.
 *   inhibit      to forbid discarding, while the guest is still acknowledged.
 *
 * docs/c-abi.md explains the requirements and invariants that are cited by number; sections of VIRTIO
 * are those of version 1.4 of the standard.
 *
 * LIFE CYCLE
 *
 *   aerostat_runtime_new()             once in a process: the threads
 *   aerostat_device_new()              offers features         -> AEROSTAT_STATE_CONFIGURING
 *   aerostat_memory_new()
 *   aerostat_device_set_memory()       where the guest's memory is
 *   aerostat_device_set_features()     FEATURES_OK
 *   aerostat_device_start_queue()      for each queue: its rings, or "the VMM pops elements"
 *   aerostat_device_activate()         DRIVER_OK                -> AEROSTAT_STATE_ACTIVE
 *   aerostat_device_set_target()       whenever the balloon should change
 *   aerostat_device_pause(), _resume() the VM stops and goes on <-> AEROSTAT_STATE_PAUSED
 *   aerostat_device_save(), _restore() the VM goes on elsewhere
 *   aerostat_device_reset()            the driver resets        -> AEROSTAT_STATE_CONFIGURING
 *   aerostat_device_destroy(), aerostat_memory_destroy(), aerostat_runtime_destroy()
 *
 * The target may be set, the memory replaced, and discarding inhibited, in every state.
 *
 * In short, without its error handling; ffi/examples has whole programs:
 *
 *     struct aerostat_runtime_config threads = AEROSTAT_RUNTIME_CONFIG_INIT;
 *     struct aerostat_device_config offer = AEROSTAT_DEVICE_CONFIG_INIT;
 *     struct aerostat_memory_region ram = AEROSTAT_MEMORY_REGION_INIT;
 *     struct aerostat_queue_config inflate = AEROSTAT_QUEUE_CONFIG_INIT;
 *     struct aerostat_runtime *runtime;
 *     struct aerostat_memory *memory;
 *     struct aerostat_device *device;
 *
 *     aerostat_runtime_new(&threads, &runtime);
 *     offer.config_fd = config_change_eventfd;
 *     aerostat_device_new(runtime, &offer, &device);
 *
 *     ram.flags = AEROSTAT_REGION_SHARED;
 *     ram.fd = memfd;
 *     ram.hva = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
 *     ram.len_bytes = len;
 *     aerostat_memory_new(&ram, 1, &memory);
 *     aerostat_device_set_memory(device, memory);
 *     aerostat_memory_destroy(&memory);
 *
 *     aerostat_device_set_features(device, features_the_driver_selected);
 *     inflate.queue_size = 128;
 *     inflate.kick_fd = ioeventfd;
 *     inflate.call_fd = irqfd;
 *     inflate.desc_gpa = desc, inflate.avail_gpa = avail, inflate.used_gpa = used;
 *     aerostat_device_start_queue(device, 0, &inflate);
 *     aerostat_device_activate(device);
 *
 *     aerostat_device_set_target(device, 512u << 20);
 *     ...
 *     aerostat_device_destroy(&device);
 *     aerostat_runtime_destroy(&runtime);
 *
 * RULES FOR ALL FUNCTIONS
 *
 * Errors. A function that returns int returns a negative errno value if it fails, and says why in
 * aerostat_last_error(). A call that failed changed nothing, unless its description says otherwise.
 * Each value has one meaning throughout, but in the answers for single ranges of
 * aerostat_runtime_discard():
 *
 *   -EFAULT         a pointer is NULL that must not be
 *   -EMSGSIZE       the size of a structure is too small: is it set?
 *   -E2BIG          a structure asks for something that this version of the library does not know
 *   -EINVAL         a value is outside its domain, or a flag is not known
 *   -EEXIST         memory regions overlap
 *   -EADDRNOTAVAIL  an address or length is not aligned
 *   -ERANGE         an address is outside guest memory, or overflows
 *   -EROFS          what has to be written to is in a read-only region
 *   -EBADF          a descriptor is closed, or of the wrong kind
 *   -ENOTSUP        a feature is not offered, not negotiated, not compiled in, or not the host's
 *   -EALREADY       the device or queue is started already, or a cgroup attached
 *   -ENOTCONN       the device is not set up far enough
 *   -EBUSY          the device is paused
 *   -EPROTO         the call ends something that was not begun
 *   -ENOENT         there is no such queue, or no such cgroup
 *   -ENODATA        a cgroup has no limit that could be its budget
 *   -ENODEV         a cgroup is not accounted for by the memory controller
 *   -ENXIO          there is no such host node
 *   -EAGAIN         too many elements wait
 *   -ETIMEDOUT      the guest did not answer in time
 *   -EBADMSG        bytes are no saved state, or damaged
 *   -EPROTONOSUPPORT  a saved state has a version that is not known
 *   -ENOBUFS        a buffer is too short
 *   -EDEADLK        a log callback called what would wait for it
 *   -ENOTRECOVERABLE  the library hit a bug of its own. All later calls on the device return this;
 *                   destroy it. Other devices, and the process, are not affected.
 *   other values    what the operating system answered
 *
 * What the guest does is never an error of a call: it is acknowledged, as far as the standard asks
 * for it, and counted (struct aerostat_counters).
 *
 * Structures that start with `size` can grow. Set size to sizeof the structure; the *_INIT macros
 * do. Fields that a caller's version lacks count as 0; fields that the library's version lacks have
 * to be 0, else the call fails with -E2BIG. In structures that the library fills, fields that it
 * does not know become 0, and size then tells how many bytes it filled. Reserved fields are 0.
 *
 * Pointers. Unless a description says otherwise, a pointer may not be NULL, has to point to what its
 * type says, and is used during the call only. NULL is always noticed; other wrong pointers cannot be.
 *
 * Handles are what the *_new() functions store in *out. The caller owns them until *_destroy(),
 * which takes the address of the pointer, sets it to NULL, and cannot fail. A handle must not be used
 * after that, through a copy for instance.
 *
 * Descriptors are duplicated by the library if it keeps them (close-on-exec); the caller's may be
 * closed after the call.
 *
 * Threads. Functions may be called from any thread, several at a time and on the same handle, except
 * *_destroy(), which has to be the last call on its handle. The library calls the VMM back only
 * through aerostat_set_log(); all else is signalled by eventfds. Functions that "may wait for
 * milliseconds" wait for requests in flight, which never wait for the VMM in their turn. No function
 * may be called from a signal handler, or in a child after fork().
 */
