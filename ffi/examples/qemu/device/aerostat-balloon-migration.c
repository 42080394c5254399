/*
 * A virtio balloon whose work is done by libaerostat: its migration
 *
 * SPDX-License-Identifier: GPL-2.0-or-later
 */
#include "qemu/osdep.h"
#include "qemu/error-report.h"
#include "qemu/lockable.h"
#include "exec/address-spaces.h"
#include "exec/memory.h"
#include "exec/ramblock.h"
#include "migration/misc.h"
#include "migration/vmstate.h"
#include "system/runstate.h"
#include "aerostat-balloon.h"
#include "trace/trace-hw_virtio.h"

/* How long a guest may take for its hints; it lacks its free memory meanwhile. */
#define HINTS_MS 30000

/* A range that the guest does not use need not be sent. */
static void skip_range(AerostatBalloon *s, hwaddr gpa, uint64_t bytes)
{
    while (bytes) {
        MemoryRegionSection section =
            memory_region_find(get_system_memory(), gpa, bytes);
        uint64_t here;

        if (!section.mr) {
            return;
        }
        here = int128_get64(section.size);
        if (section.offset_within_address_space == gpa &&
            memory_region_is_ram(section.mr)) {
            qemu_guest_free_page_hint((uint8_t *)
                                      memory_region_get_ram_ptr(section.mr) +
                                      section.offset_within_region, here);
            s->core.hinted_bytes += here;
        }
        memory_region_unref(section.mr);
        here += section.offset_within_address_space - gpa;
        gpa += here;
        bytes -= MIN(bytes, here);
    }
}

/*
 * Takes the hints that came. Once the guest has sent all, it gets its pages
 * back at once: what it writes to them is seen by the next look at the dirty
 * log, as they were taken out of the bitmap before.
 */
void aerostat_balloon_take_hints(AerostatBalloon *s)
{
    struct aerostat_range hints[64];
    uint32_t state = AEROSTAT_HINT_IDLE;
    int i, n;

    QEMU_LOCK_GUARD(&s->hints_lock);
    if (!s->hints_running) {
        return;
    }
    do {
        n = aerostat_device_take_hints(s->core.device, hints, ARRAY_SIZE(hints),
                                       &state);
        for (i = 0; i < n; i++) {
            skip_range(s, hints[i].gpa, hints[i].len_bytes);
        }
    } while (n == ARRAY_SIZE(hints));
    if (state != AEROSTAT_HINT_RUNNING) {
        s->hints_running = false;
        aerostat_device_finish_hints(s->core.device);
        trace_aerostat_balloon_hints(s->core.hinted_bytes);
    }
}

static void finish_hints(AerostatBalloon *s)
{
    QEMU_LOCK_GUARD(&s->hints_lock);
    if (s->hints_running) {
        s->hints_running = false;
        aerostat_device_finish_hints(s->core.device);
        trace_aerostat_balloon_hints(s->core.hinted_bytes);
    }
}

/*
 * The guest is asked once, when all its memory is still to be sent. A hint that
 * comes after the next look at the dirty log is too late, since that may have
 * found the page written to: the round ends before it.
 */
static int aerostat_balloon_precopy(NotifierWithReturn *notifier, void *data,
                                    Error **errp)
{
    AerostatBalloon *s = container_of(notifier, AerostatBalloon,
                                      precopy_notifier);
    PrecopyNotifyData *event = data;

    switch (event->reason) {
    case PRECOPY_NOTIFY_SETUP:
        s->hints_asked = false;
        s->core.hinted_bytes = 0;
        break;
    case PRECOPY_NOTIFY_AFTER_BITMAP_SYNC:
        /* A page that postcopy is to fetch must not be left out. */
        if (s->hints_asked || migrate_postcopy_ram()) {
            break;
        }
        s->hints_asked = true;
        WITH_QEMU_LOCK_GUARD(&s->hints_lock) {
            s->hints_running = !aerostat_device_start_hints(s->core.device,
                                                            HINTS_MS);
        }
        break;
    case PRECOPY_NOTIFY_BEFORE_BITMAP_SYNC:
    case PRECOPY_NOTIFY_COMPLETE:
    case PRECOPY_NOTIFY_CLEANUP:
    default:
        finish_hints(s);
    }
    return 0;
}

/* After the features and queues have been loaded. */
int aerostat_balloon_post_load(VirtIODevice *vdev)
{
    return aerostat_core_restore(&AEROSTAT_BALLOON(vdev)->core);
}

const VMStateDescription vmstate_aerostat_balloon_device = {
    .name = "aerostat-balloon-device",
    .version_id = 1,
    .minimum_version_id = 1,
    .fields = (const VMStateField[]) {
        VMSTATE_STRUCT(core, AerostatBalloon, 1, vmstate_aerostat_core,
                       AerostatCore),
        VMSTATE_END_OF_LIST()
    },
};

void aerostat_balloon_migration_init(AerostatBalloon *s)
{
    s->precopy_notifier.notify = aerostat_balloon_precopy;
    precopy_add_notifier(&s->precopy_notifier);
}

void aerostat_balloon_migration_cleanup(AerostatBalloon *s)
{
    precopy_remove_notifier(&s->precopy_notifier);
    finish_hints(s);
}
