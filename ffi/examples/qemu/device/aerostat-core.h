/*
 * A balloon whose work is done by libaerostat: what the balloons of all protocols
 * have in common
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#ifndef HW_VIRTIO_AEROSTAT_CORE_H
#define HW_VIRTIO_AEROSTAT_CORE_H

#include "exec/memory.h"
#include "hw/qdev-properties.h"
#include "qemu/notify.h"
#include "qemu/thread.h"
#include "qemu/units.h"
#include "qom/object.h"

#include <aerostat.h>

typedef struct AerostatCore {
    /* The device that it is a part of. */
    Object *owner;
    struct aerostat_runtime *runtime;
    struct aerostat_device *device;

    /* Memory: what the library was told, and what the listener collects. */
    MemoryListener listener;
    GArray *sections;
    GArray *new_sections;

    /* Discards are forbidden; see aerostat_core_update_inhibit(). */
    QemuMutex inhibit_lock;
    bool inhibited;

    /* Migration. */
    NotifierWithReturn migration_notifier;
    uint8_t *saved;
    uint32_t saved_bytes;
    uint64_t hinted_bytes;

    /* The size that the monitor was last told of. */
    uint64_t announced_bytes;

    /* Properties. */
    uint64_t write_behind_bytes;
    uint32_t write_behind_ms;
    uint32_t workers;
} AerostatCore;

#define DEFINE_AEROSTAT_CORE_PROPERTIES(_type, _core)                       \
    DEFINE_PROP_SIZE("write-behind", _type, _core.write_behind_bytes,       \
                     32 * MiB),                                             \
    DEFINE_PROP_UINT32("write-behind-ms", _type, _core.write_behind_ms, 10), \
    DEFINE_PROP_UINT32("workers", _type, _core.workers, 0)

/* aerostat-core.c */
extern const VMStateDescription vmstate_aerostat_core;
void aerostat_core_instance_init(AerostatCore *core, Object *owner);
void aerostat_core_instance_finalize(AerostatCore *core);
bool aerostat_core_new(AerostatCore *core,
                       const struct aerostat_device_config *offer, Error **errp);
void aerostat_core_free(AerostatCore *core);
void aerostat_core_complain(AerostatCore *core, const char *what);
void aerostat_core_attach(AerostatCore *core);
void aerostat_core_detach(AerostatCore *core);
void aerostat_core_update_inhibit(AerostatCore *core);
int aerostat_core_restore(AerostatCore *core);

/* aerostat-balloon-memory.c */
void aerostat_core_memory_init(AerostatCore *core);
void aerostat_core_memory_cleanup(AerostatCore *core);

/* aerostat-balloon-monitor.c */
uint64_t aerostat_core_ram_bytes(void);
bool aerostat_core_monitor_init(AerostatCore *core, Error **errp);
void aerostat_core_monitor_cleanup(AerostatCore *core);
void aerostat_core_add_properties(AerostatCore *core);
void aerostat_core_announce_actual(AerostatCore *core);

#endif
